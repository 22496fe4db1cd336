"""What minutes of branch and bound buy: `python -m benchmarks.minutes --cards ... --data DIR --minutes 8 60`.

The bracket of W_2 around a network's accuracy, on one core: what the search for minimal distances leaves, and what is
proved by CROWN alone and after so many minutes of proofs, spent as `wdat.evaluate` spends them (`branching_minutes`).
Each time goes on from the one before, and all from what is kept in `--state`: of an evaluation, its proofs count.

Writes minutes.json and its table beside this file, and the table into README.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from wdat import records
from wdat.accuracy.allocation import accuracy_curve
from wdat.report import numbers
from wdat.report.rows import percent
from wdat.report.table import tabled
from wdat.studies.cache import Cache, distances
from wdat.studies.certificates import bracketed
from wdat.studies.jobs import Run, run_all
from wdat.threats.ball import Threat, plain_number
from wdat.zoo.data import Data, load_data
from wdat.zoo.models import load_model

HERE = Path(__file__).parent


def bought(
    name: str, model: nn.Module, data: Data, threats: Sequence[Threat], minutes: Sequence[float], state: Path | None
) -> dict:  # fmt: skip
    """One network, threats of one pixel norm: seconds, radii raised and what is proved at each threat, time by time."""
    r, kept = threats[0].r, Cache(state, model)
    distance = distances(model, data, r, state=state, progress=False).distance
    times = []
    for limit in [0.0, *sorted(minutes)]:
        found = bracketed(kept, data, r, distance, threats, branching=limit, progress=False)
        times.append({
            "minutes": limit, "seconds": found.seconds, "raised": int((found.raised > found.crown).sum()),
            "proved": [float(accuracy_curve(found.raised, t.delta, t.p)) for t in threats],
        })  # fmt: skip
    return {
        "network": name, "n": len(data), "r": plain_number(r), "times": times,
        "threats": [t.describe() for t in threats],
        "left": [float(accuracy_curve(distance, t.delta, t.p)) for t in threats],
    }  # fmt: skip


def measured(card: Path, weights: str | None, data: Data, state: Path, **settings) -> dict:
    """`bought` of a card, in a process of its own."""
    model = load_model(str(card), root=weights).requires_grad_(False)
    return bought(card.stem, model, data, state=state / f"{card.stem}.parts", **settings)


@tabled("minutes-benchmark")
def times(found: dict) -> tuple[list[dict], str]:
    """A row a network and time, a column a radius at which anything is proved: that, and what is open of the rest."""
    rows = []
    for row in found["rows"]:
        written = [threat["written"] for threat in row["threats"]]
        shown = [k for k in range(len(written)) if any(time["proved"][k] > 0 for time in row["times"])]
        for time in row["times"]:
            cells = {
                f"δ = {written[k]}": f"{percent(time['proved'][k])} (−{percent(row['left'][k] - time['proved'][k])})"
                for k in shown
            }
            own = {"network": row["network"], "minutes": f"{time['minutes']:g}", "raised": str(time["raised"])}
            rows.append(own | cells)
    n = ", ".join(dict.fromkeys(str(row["n"]) for row in found["rows"]))
    norm = ", ".join(dict.fromkeys(f"l{row['r']}" for row in found["rows"]))
    return rows, (
        f"Accuracy proved under W₂ threats, {norm}, %, {n} images, by CROWN (0 minutes) and after minutes of branch "
        "and bound on one core; in brackets how far below what attack leaves."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see --help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minutes", description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=Path, nargs="+", required=True, help="model cards")
    parser.add_argument("--weights", help="folder of their weights")
    parser.add_argument("--data", required=True, help="name or folder, as for wdat.load_data: its test images")
    parser.add_argument("--norm", default="inf", help="pixel norm, 2 or inf")
    parser.add_argument("--deltas", nargs="+", default=["1/510", "1/255", "2/255"])
    parser.add_argument("--minutes", type=float, nargs="+", default=[8.0, 60.0])
    parser.add_argument("--jobs", type=int, default=0, help="networks at the same time; 0: as many as fit")
    parser.add_argument("--state", type=Path, default=Path(".wdat/minutes"), help="folder of what was found before")
    parser.add_argument("--out", type=Path, default=HERE / "minutes.json")
    chosen = parser.parse_args(arguments)
    given = {
        "weights": chosen.weights, "data": load_data(chosen.data, "test"), "state": chosen.state,
        "threats": [Threat(delta, 2, chosen.norm) for delta in chosen.deltas], "minutes": chosen.minutes,
    }  # fmt: skip
    runs = [Run(card.stem, measured, {"card": card, **given}) for card in chosen.cards]
    rows = run_all(runs, chosen.jobs, desc="minutes")
    config = {name: getattr(chosen, name) for name in ("norm", "deltas", "minutes")}
    config["cards"] = [card.stem for card in chosen.cards]
    records.write(chosen.out, "minutes-benchmark", {"rows": rows}, config, "cpu")
    print(times(chosen.out).markdown())
    if chosen.out.parent == HERE:
        numbers.fill(HERE / "README.md")


if __name__ == "__main__":
    main()
