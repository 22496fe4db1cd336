"""How long `make reproduce` takes on how many cores: timed with one run at once and with several, and a model for more.

`python -m benchmarks.timing` makes every notebook of a profile anew, with one run at once and then with several, and
writes `timing.json` with the machine, and from it a table and the README's line. It leaves the latter's records, as
`make reproduce` makes them. On a machine with other work the times mean nothing: how busy it is before each is
recorded, and said.

The model: all work is spread over the cores, runs and what notebooks do beside their lists of runs (start of a kernel,
loading, drawing); every worker of the notebooks has to start; no notebook ends before what it does beside its runs and
the longest run of each list, nor begins before those it needs; and where all cores are busy, a run takes longer (shared
caches, memory, clock) by a factor measured once, of all runs together.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from wdat import records
from wdat.report.numbers import fill
from wdat.report.table import tabled
from wdat.reproduce.profiles import needed, notebooks
from wdat.reproduce.runner import reproduce

HERE = Path(__file__).parent
MORE = (4, 8, 16)  # cores that the model speaks of
BUSY = 0.3  # of a core, from which on a machine is not quiet
LOOK = 5.0  # seconds that it is looked at

Parts = dict[str, dict[str, float]]  # by notebook: seconds "serial", of "runs", "longest" of each list, worker "starts"


def parts(state: dict[str, dict]) -> Parts:
    """What each notebook's last run consisted of, from the runner's state."""
    found = {}
    for name, entry in state.items():
        spent = entry["spent"]
        serial = entry["seconds"] - spent.get("lists", 0)
        found[name] = {"serial": serial} | {key: spent.get(key, 0) for key in ("runs", "longest")}
        found[name]["starts"] = spent.get("waiting", 0)
    return found


def slowdown(one: Parts, many: Parts) -> float:
    """By how much runs take longer among others than alone, of the notebooks timed both ways."""
    return sum(many[name]["runs"] for name in one) / sum(own["runs"] for own in one.values())


def alone(one: Parts, many: Parts) -> Parts:
    """Parts with one run at once: as timed, or by the slow-down of the others where only `many` has the notebook."""
    factor = slowdown(one, many)
    scaled = {n: own | {key: own[key] / factor for key in ("runs", "longest")} for n, own in many.items()}
    return scaled | {name: own | {"starts": many[name]["starts"]} for name, own in one.items()}


def seconds(notebooks: Parts, cores: int, factor: float, needs: dict[str, Sequence[str]], workers: int) -> float:
    """By the model. factor: of the slow-down, which one core does not have; workers: of a notebook, whose start it has.

    needs: notebooks, by name, before which one does not begin.
    """
    if cores == 1:
        return sum(own["serial"] + own["runs"] for own in notebooks.values())
    ends: dict[str, float] = {}
    for name, own in notebooks.items():
        begins = max((ends[other] for other in needs[name] if other in ends), default=0.0)
        ends[name] = begins + own["serial"] + factor * own["longest"] + own["starts"] / workers
    work = sum(own["serial"] + factor * own["runs"] for own in notebooks.values()) / cores
    return max(*ends.values(), work + sum(own["starts"] for own in notebooks.values()) / workers)


def timed(profile: str, jobs: int, only: Sequence[str] | None) -> tuple[dict[str, dict], float, float]:
    """The state of the notebooks made anew, how many cores were busy before, and how long all took."""
    load = psutil.cpu_percent(LOOK) / 100 * psutil.cpu_count()  # cores now: a load average remembers the run before
    if load > BUSY:
        print(f"{load:.2f} cores busy before the run with {jobs} at once: its times mean little", flush=True)
    begun = time.perf_counter()
    made = reproduce(profile, only, force=True, jobs=jobs)
    wall = time.perf_counter() - begun
    state = json.loads((records.root() / ".wdat" / profile / "state.json").read_text())
    return {name: state[name] for name in sorted(made)}, load, wall


def results(
    one: dict[str, dict], many: dict[str, dict], jobs: int, loads: Sequence[float], walls: Sequence[float],
    needs: dict[str, Sequence[str]],
) -> dict:  # fmt: skip
    """Measured and modelled seconds by cores. "measured" with one core only where every notebook was timed so.

    walls: of the call with `jobs`, and of that with one.
    """
    factor, whole = slowdown(parts(one), parts(many)), alone(parts(one), parts(many))
    measured = {jobs: walls[0]} | ({1: walls[1]} if one.keys() == many.keys() else {})
    model = {cores: seconds(whole, cores, factor, needs, jobs) for cores in sorted({1, jobs, *MORE})}
    first = measured.get(1, model[1])
    rows = [
        {
            "cores": cores, "measured": measured.get(cores), "model": took,
            "efficiency": first / measured.get(cores, took) / cores,
        }
        for cores, took in model.items()
    ]  # fmt: skip
    return {"jobs": jobs, "loads": list(loads), "slowdown": factor, "notebooks": whole, "rows": rows}


@tabled("timing")
def table(found: dict) -> tuple[list[dict[str, str]], str]:
    """Minutes by cores: measured, by the model, and what share of the cores was of use."""
    rows = [
        {
            "cores": str(row["cores"]),
            "minutes, measured": "–" if row["measured"] is None else f"{row['measured'] / 60:.1f}",
            "minutes, by the model": f"{row['model'] / 60:.1f}", "efficiency": f"{row['efficiency']:.2f}",
        }
        for row in found["rows"]
    ]  # fmt: skip
    return rows, f"All notebooks of the profile; runs among others take {found['slowdown']:.2f} times as long as alone."


def sentence(record: dict) -> str:
    """The README's line."""
    rows, jobs = {row["cores"]: row for row in record["results"]["rows"]}, record["results"]["jobs"]
    one = f"{(rows[1]['measured'] or rows[1]['model']) / 60:.0f} on one" + " (by the model)" * (not rows[1]["measured"])
    more = ", ".join(f"{rows[cores]['model'] / 60:.0f} on {cores}" for cores in MORE)
    took = f"{rows[jobs]['measured'] / 60:.0f} minutes on {jobs} cores of {record['provenance']['device']}"
    return f"`make reproduce` took {took}, {one}; by the model of `benchmarks/timing.py` {more}.\n"


def main() -> None:
    """Time a profile and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="digits")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--one", nargs="*", help="notebooks also timed with one run at once (default: all)")
    args = parser.parse_args()
    one, idle, longer = timed(args.profile, 1, args.one or None)
    many, busy, wall = timed(args.profile, args.jobs, None)
    needs = needed(notebooks(records.root()))
    found = results(one, many, args.jobs, [busy, idle], [wall, longer], needs)
    config = {"profile": args.profile, "jobs": args.jobs, "one": sorted(one)}
    path = records.write(HERE / "timing.json", "timing", found, config, "cpu")
    print(table(path).markdown())
    records.write_file(HERE / "timing-took.md", sentence(records.read(path)))
    for page in (HERE / "README.md", records.root() / "README.md"):
        fill(page)


if __name__ == "__main__":
    main()
