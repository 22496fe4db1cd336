"""Run the notebooks of a profile, headless, each after those it needs, and resume where the last run stopped.

`notebooks/NN_name.py` is the source, `notebooks/profiles/<profile>.yaml` its settings: `common: {...}` for every
notebook that declares the parameter, one section per notebook name for its own, and `jobs`. Figures go to
`figures/<profile>/`, scratch files (networks, checkpoints) to `.wdat/<profile>/made/`, the executed copies to
`notebooks/NN_name.ipynb` for the default profile and beside the records for the others. Which notebooks one
needs it says itself (`profiles.needed`); as many run at the same time as there are jobs, and share them: a notebook
computes in the gaps that those begun before it leave.

A notebook is done when it ran to its end, and stays done while its code and all of `wdat` that it reaches (looks, names
and places apart: `wdat.digest`), its parameters, the lock file, its outputs and the records and scratch files of the
notebooks it needs are the same. A run cut short is taken up with its scratch files; under other conditions they are
removed first, so that nothing old is picked up. Data and weights from elsewhere are not watched: `force` when they
change.
"""

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import joblib

from wdat import records
from wdat.reproduce import execution, profiles, staleness
from wdat.reproduce.execution import relative
from wdat.reproduce.profiles import DEFAULT
from wdat.reproduce.screen import Screen
from wdat.reproduce.staleness import digests, stamps

KINDS = ("training", "evaluation", "certificates", "drawing", "waiting")


def reproduce(
    profile: str = DEFAULT,
    only: Sequence[str] | None = None,
    force: bool = False,
    root: str | Path | None = None,
    out: str | Path | None = None,
    parameters: dict[str, Any] | None = None,
    jobs: int | None = None,
) -> list[str]:
    """Run what is not done yet; returns the names of the notebooks that ran.

    Args:
        profile: a file in notebooks/profiles, without its ending.
        only: notebooks by name or leading number ("02"); the others are left alone.
        force: run them even if they are done.
        root: the repository (default: found from the working folder upward).
        out: folder of figures, tables and records (default: figures/<profile>).
        parameters: override the profile in every notebook that declares them.
        jobs: runs at the same time, of all notebooks (default: the profile's, or as many as cores and memory allow);
            alters no number.

    Raises ValueError for an unknown profile, notebook or parameter, OSError for a folder that cannot be written, both
    before anything runs; `execution.CellFailed` when notebooks stopped, after all that do not need them. Run again
    after either: finished notebooks are kept.
    """
    root = records.root() if root is None else Path(root).absolute()
    sources = profiles.notebooks(root)
    settings, needs = profiles.read_profile(root, profile, sources), profiles.needed(sources)
    chosen = profiles.choose(sources, only)
    scratch = root / ".wdat" / profile
    jobs = settings["jobs"] if jobs is None else jobs
    if jobs < 0:
        raise ValueError(f"jobs={jobs} must be 0 (as many as cores and memory allow) or at least 1")
    places = profiles.places(profile, out)
    passed = profiles.parameters(sources, chosen, settings, places | {"jobs": jobs}, parameters or {})
    executed = {name: profiles.executed_copy(root, profile, name, places["out"]) for name in sources}
    folders = {name: [root / (places | passed[name])[key] for key in places] for name in chosen}
    for folder in {scratch, *(f for pair in folders.values() for f in pair), *(executed[n].parent for n in chosen)}:
        records.check_writable(folder)

    with _one_run_at_a_time(scratch, profile):
        run = _Run(root, scratch, profile, sources, needs, passed, executed, folders, force)
        run.screen.say(records.device_line())
        run.state = _read_state(scratch / "state.json")
        run.claim_leftovers()
        jobs = jobs or (1 if records.pick_device().type == "cuda" else joblib.cpu_count())
        with _slots(jobs) as run.slots:
            failed = run.all(chosen, jobs)
        if run.ran:
            run.screen.say(_times({name: run.state[name] for name in run.ran}, time.perf_counter() - run.started))
        if failed:
            raise execution.CellFailed("\n".join(map(str, failed)))
    return run.ran


@dataclass
class _Run:
    """One call of `reproduce`: what it knows of every notebook, by name, and how far it is."""

    root: Path
    scratch: Path
    profile: str
    sources: dict[str, Path]
    needs: dict[str, list[str]]
    passed: dict[str, dict[str, Any]]
    executed: dict[str, Path]
    folders: dict[str, list[Path]]  # of results and of scratch files
    force: bool
    slots: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    begun: dict[str, tuple] = field(default_factory=dict)  # when, whether afresh, and the stamps of all files then
    screen: Screen = field(default_factory=Screen)
    started: float = field(default_factory=time.perf_counter)

    def all(self, chosen: Sequence[str], jobs: int) -> list[Exception]:
        """Run every notebook after those it needs, at most `jobs` at the same time; returns what stopped any.

        One that stops leaves out those that need it.
        """
        waiting, running, failed = list(chosen), {}, []
        with ThreadPoolExecutor(jobs) as pool, execution.stoppable():
            while waiting or running:
                for name in tuple(waiting) if len(running) < jobs else ():
                    if {*waiting, *running.values()} & {*self.needs[name]}:
                        continue
                    waiting.remove(name)
                    if call := self.begin(name, [name, *waiting, *running.values()], jobs):
                        running[pool.submit(call)] = name
                        break
                else:
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        name = running.pop(done)
                        try:
                            self.end(name, done.result())
                        except execution.CellFailed as error:
                            failed.append(error)
                            waiting = [other for other in waiting if name not in self.needs[other]]
                            others = "; the others go on" if running or waiting else ""
                            self.screen.say(f"{self.label(name)} stopped{others}")
        return failed

    def label(self, name: str) -> str:
        """How lines about a notebook begin."""
        return f"[{list(self.sources).index(name) + 1}/{len(self.sources)}] {name}"

    def begin(self, name: str, left: Sequence[str], jobs: int) -> Callable[[], float] | None:
        """What runs a notebook, if it must run; left: what is to be done, this one included."""
        root, state, folders = self.root, self.state, self.folders[name]
        key = staleness.key(root, self.sources[name], self.passed[name], state, self.needs[name])
        reasons = ["forced"] * self.force or staleness.reasons(root, key, state.get(name, {}))
        if not reasons:
            self.screen.say(f"{self.label(name)}: up to date")
            return None
        self.screen.say(f"{self.label(name)} … ({'; '.join(reasons)}){_forecast(state, left, jobs)}")
        if reasons == ["text changed"]:
            copy = execution.with_new_text(self.sources[name], self.executed[name], self.passed[name])
            records.write_file(self.executed[name], execution.tidy(copy, root))
            outputs = state[name]["outputs"] | digests(root, [self.executed[name]])
            self.save(name, state[name] | {"key": key, "outputs": outputs})
            return None
        old = state.get(name, {"key": None, "outputs": {}})
        before = stamps(folders)
        if fresh := self.force or not staleness.same_conditions(old["key"], key):
            self.remove(old["outputs"], folders[1])
            self.journal(name).unlink(missing_ok=True)
        self.begun[name] = time.perf_counter(), fresh, before
        self.save(name, old | {"key": key, "done": False, "before": [relative(root, path) for path in before]})
        self.journal(name).parent.mkdir(exist_ok=True)
        told = {
            "WDAT_COMMAND": f"wdat reproduce --profile {self.profile} --only {name[:2]}",
            "WDAT_MADE_OF": json.dumps(staleness.made_of(key)),
            "WDAT_SLOTS": self.slots, "WDAT_WRITTEN": str(self.journal(name)),
        }  # fmt: skip
        return partial(execution.execute, self.sources[name], self.executed[name], self.passed[name], self.scratch,
                       told, root, self.screen)  # fmt: skip

    def end(self, name: str, drawing: float) -> None:
        """A notebook has run: what it wrote, and how long it took."""
        root, folders, old, (begun, fresh, before) = self.root, self.folders[name], self.state[name], self.begun[name]
        changed = [path for path, stamp in stamps(folders).items() if before.get(path) != stamp]
        written = self.own(name, changed)
        if fresh:
            kept = {relative(root, path) for path in (*written, self.executed[name])}
            self.remove(set(old["outputs"]) - kept, folders[0])
        outputs = digests(root, [*(root / path for path in old["outputs"]), *written, self.executed[name]])
        for other in self.state.values():  # a file belongs to the notebook that wrote it last
            other["outputs"] = {path: sha for path, sha in other["outputs"].items() if path not in outputs}
        seconds = time.perf_counter() - begun
        made = {"drawing": drawing} | execution.spent(path for path in written if path.suffix == ".json")
        entry = {"key": old["key"], "done": True, "outputs": outputs, "seconds": round(seconds, 1), "spent": made}
        self.save(name, entry)
        self.ran.append(name)
        whole = time.perf_counter() - self.started
        self.screen.say(f"{self.label(name)} done in {_clock(seconds)}, {_clock(whole)} in all")

    def save(self, name: str, entry: dict[str, Any]) -> None:
        """Keep what is known of a notebook."""
        self.state[name] = entry
        _save_state(self.scratch, self.state)

    def journal(self, name: str) -> Path:
        """The list of files that a notebook wrote through `records.write_file`."""
        return self.scratch / "written" / name

    def own(self, name: str, changed: Sequence[Path]) -> list[Path]:
        """Those files that this notebook wrote: others, at the same time, may have written some by their journals."""
        journals = {path.name: set(path.read_text().splitlines()) for path in self.journal(name).parent.glob("*")}
        mine = journals.pop(name, set())
        theirs = set().union(*journals.values()) - mine
        return [path for path in changed if os.path.realpath(path) not in theirs]

    def claim_leftovers(self) -> None:
        """Give the files of notebooks that were cut short to them, to be resumed or removed with them."""
        everywhere = list(stamps([folder for pair in self.folders.values() for folder in pair]))
        for name, entry in self.state.items():
            if "before" in entry:
                owned = {path for other in self.state for path in self.state[other]["outputs"] if other != name}
                owned |= set(entry.pop("before"))
                left = [path for path in everywhere if relative(self.root, path) not in owned]
                entry["outputs"] |= digests(self.root, self.own(name, left))

    def remove(self, paths: Iterable[str], folder: Path) -> None:
        """Remove those of a notebook's earlier files that lie in this folder: they were made under other conditions."""
        stale = [path for path in map(self.root.joinpath, paths) if path.is_relative_to(folder) and path.is_file()]
        for path in stale:
            path.unlink()
        if stale:
            self.screen.say(f"    removed {len(stale)} outdated file(s) from {relative(self.root, folder)}")


def _forecast(state: dict[str, Any], left: Sequence[str], jobs: int) -> str:
    """How long the first of these notebooks took the last time, and how long all will take, if that is known."""
    last = [state.get(name, {}) for name in left]
    if not all("seconds" in entry for entry in last):
        return ""
    work = [entry["seconds"] - entry["spent"].get("lists", 0) + entry["spent"].get("runs", 0) for entry in last]
    return f"; the last time {_clock(last[0]['seconds'])}, all that is left about {_clock(sum(work) / jobs)}"


def _times(entries: dict[str, dict[str, Any]], wall: float) -> str:
    """A table: seconds of each notebook's run, and what its processes, added up, spent on which kind of work.

    The last line is of all: `wall` seconds, less than the sum of those that ran at the same time.
    """
    kinds = {kind: sum(entry["spent"].get(kind, 0) for entry in entries.values()) for kind in KINDS}
    entries = {**entries, "all": {"seconds": wall, "spent": kinds}}
    lines = [f"{'seconds':22}" + "".join(f"{kind:>14}" for kind in ("in all", *KINDS))]
    for name, entry in entries.items():
        spent = [entry["seconds"], *(entry["spent"].get(kind, 0) for kind in KINDS)]
        lines.append(f"{name:22}" + "".join(f"{seconds:14.1f}" for seconds in spent))
    return "\n".join(lines)


# State on disk


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        print(f"    {path} cannot be read; starting afresh", flush=True)
        return {}


def _save_state(scratch: Path, state: dict[str, Any]) -> None:
    records.write_file(scratch / "state.json", json.dumps(state, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def _slots(jobs: int) -> Iterator[str]:
    """The budget that all notebooks share: a folder of as many files, one to be locked by every run that computes."""
    with tempfile.TemporaryDirectory(prefix="wdat-slots-") as folder:
        for number in range(jobs):
            (Path(folder) / str(number)).touch()
        yield folder


@contextmanager
def _one_run_at_a_time(scratch: Path, profile: str) -> Iterator[None]:
    with (scratch / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the system if this process is killed
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise OSError(
                f"profile {profile} is being run already (process {holder}); wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
