"""Run the notebooks of a profile in order, headless, and resume where the last run stopped.

`notebooks/NN_name.py` is the source, `notebooks/profiles/<profile>.yaml` its settings: `common: {...}` for every
notebook that declares the parameter, one section per notebook name for its own, and `jobs`. Figures go to
`figures/<profile>/`, scratch files (networks, checkpoints) to `.wdat/<profile>/made/`, the executed copies to
`notebooks/NN_name.ipynb` for the default profile and `.wdat/<profile>/notebooks/` for the others.

A notebook is done when it ran to its end, and stays done while its code and all of `wdat` that it reaches (looks, names
and places apart: `wdat.digest`), its parameters, the lock file, its outputs and the records and scratch files of the
notebooks before it are the same. A run cut short is taken up with its scratch files; under other conditions they are
removed first, so that nothing old is picked up. Data and weights from elsewhere are not watched: `force` when they
change.
"""

import ast
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from wdat import records
from wdat.reproduce import execution, staleness
from wdat.reproduce.execution import relative
from wdat.reproduce.staleness import digests, stamps
from wdat.settings import Written, check_names, parse_number, read

DEFAULT = "digits"
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
        jobs: runs at the same time (default: the profile's, or as many as cores and memory allow); alters no number.

    Raises ValueError for an unknown profile, notebook or parameter, OSError for a folder that cannot be written, both
    before anything runs; `execution.CellFailed` when a notebook stops. Run again after either: finished notebooks are
    kept.
    """
    root = records.root() if root is None else Path(root).absolute()
    sources = notebooks(root)
    settings = read_profile(root, profile, sources)
    chosen = _choose(sources, only)
    scratch = root / ".wdat" / profile
    jobs = settings["jobs"] if jobs is None else jobs
    if jobs < 0:
        raise ValueError(f"jobs={jobs} must be 0 (as many as cores and memory allow) or at least 1")
    places = {"out": str(out or f"figures/{profile}"), "work": f".wdat/{profile}/made"}
    passed = _parameters(sources, chosen, settings, places | {"jobs": jobs}, parameters or {})
    executed = {name: _executed_copy(root, profile, name) for name in sources}
    folders = {name: [root / (places | passed[name])[key] for key in places] for name in chosen}
    for folder in {scratch, *(f for pair in folders.values() for f in pair), *(executed[n].parent for n in chosen)}:
        records.check_writable(folder)

    ran: list[str] = []
    started = time.perf_counter()
    with _one_run_at_a_time(scratch, profile):
        print(records.device_line(), flush=True)
        state = _read_state(scratch / "state.json")
        _claim_leftovers(root, state, [folder for pair in folders.values() for folder in pair])
        for number, name in enumerate(sources, 1):
            if name not in chosen:
                continue
            label = f"[{number}/{len(sources)}] {name}"
            key = staleness.key(root, sources, name, passed[name], state)
            reasons = ["forced"] * force or staleness.reasons(root, key, state.get(name, {}))
            if not reasons:
                print(f"{label}: up to date", flush=True)
                continue
            print(f"{label} … ({'; '.join(reasons)}){_forecast(state, chosen, name)}", flush=True)
            if reasons == ["text changed"]:
                copy = execution.with_new_text(sources[name], executed[name], passed[name])
                records.write_file(executed[name], execution.tidy(copy, root))
                state[name] |= {"key": key, "outputs": state[name]["outputs"] | digests(root, [executed[name]])}
                _save_state(scratch, state)
                continue
            old = state.get(name, {"key": None, "outputs": {}})
            before, begun = stamps(folders[name]), time.perf_counter()
            if fresh := force or not staleness.same_conditions(old["key"], key):
                _remove(root, old["outputs"], folders[name][1])
            state[name] = old | {"key": key, "done": False, "before": [relative(root, path) for path in before]}
            _save_state(scratch, state)
            command = f"wdat reproduce --profile {profile} --only {name[:2]}"
            drawing = execution.execute(sources[name], executed[name], passed[name], scratch, command, root)
            seconds = time.perf_counter() - begun
            written = [path for path, stamp in stamps(folders[name]).items() if before.get(path) != stamp]
            if fresh:
                _remove(root, set(old["outputs"]) - {relative(root, path) for path in written}, folders[name][0])
            outputs = digests(root, [*(root / path for path in old["outputs"]), *written, executed[name]])
            for other in state.values():  # a file belongs to the notebook that wrote it last
                other["outputs"] = {path: sha for path, sha in other["outputs"].items() if path not in outputs}
            made = {"drawing": drawing} | execution.spent(path for path in written if path.suffix == ".json")
            state[name] = {"key": key, "done": True, "outputs": outputs, "seconds": round(seconds, 1), "spent": made}
            _save_state(scratch, state)
            ran.append(name)
            print(f"{label} done in {_clock(seconds)}, {_clock(time.perf_counter() - started)} in all", flush=True)
        if ran:
            print(_times({name: state[name] for name in chosen}), flush=True)
    return ran


def _forecast(state: dict[str, Any], chosen: Sequence[str], name: str) -> str:
    """How long this notebook and those after it took the last time, if that is known."""
    last = [state.get(other, {}).get("seconds") for other in chosen[chosen.index(name) :]]
    return "" if None in last else f"; the last time {_clock(last[0])}, with those after it {_clock(sum(last))}"


def _times(entries: dict[str, dict[str, Any]]) -> str:
    """A table: seconds of each notebook's last run, and what its processes, added up, spent on which kind of work."""
    lines = [f"{'seconds':22}" + "".join(f"{kind:>14}" for kind in ("in all", *KINDS))]
    for name, entry in entries.items():
        spent = [entry["seconds"], *(entry.get("spent", {}).get(kind, 0) for kind in KINDS)]
        lines.append(f"{name:22}" + "".join(f"{seconds:14.1f}" for seconds in spent))
    return "\n".join(lines)


def notebooks(root: Path) -> dict[str, Path]:
    """Name -> source of every notebook, in the order in which they run."""
    found = sorted((root / "notebooks").glob("[0-9][0-9]_*.py"))
    if not found:
        raise FileNotFoundError(f"there are no notebooks NN_name.py in {root / 'notebooks'}")
    return {path.stem: path for path in found}


def read_profile(root: Path, profile: str, sources: dict[str, Path]) -> dict[str, Any]:
    """Sections of notebooks/profiles/<profile>.yaml; ValueError for a profile or section that does not exist."""
    folder = root / "notebooks" / "profiles"
    path = folder / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        raise ValueError(f"profile {profile!r} is unknown; notebooks/profiles has: {known}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    known = ["common", "jobs", *sources]
    if not isinstance(settings, dict) or (unknown := [key for key in settings if key not in known]):
        seen = repr(unknown[0]) if isinstance(settings, dict) else "no mapping"
        raise ValueError(f"{path} has {seen}; its sections are: {', '.join(known)}")
    kinds = {key: int if key == "jobs" else dict | None for key in settings}
    settings = {key: read(kinds[key], value, f"{path.name}: {key}") for key, value in settings.items()}
    return {"common": {}, "jobs": 0} | {key: {} if value is None else value for key, value in settings.items()}


def declared(source: Path) -> dict[str, Any]:
    """Names and defaults in the one cell tagged `parameters`; ValueError unless it holds plain literals only.

    Parsed rather than matched line by line, so that values over several lines count too.
    """
    cells = [c for c in execution.load(source).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{source.name} has {len(cells)} cells tagged parameters; it must have one")
    defaults = {}
    for line in ast.parse(cells[0].source).body:
        try:
            (target,) = line.targets if isinstance(line, ast.Assign) else [line.target]
            defaults[target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError, TypeError):
            raise ValueError(
                f"{source.name}: `{ast.unparse(line)}` in the parameters cell is no plain literal"
            ) from None
    return defaults


def _choose(sources: dict[str, Path], only: Sequence[str] | None) -> list[str]:
    for word in only or []:
        if not any(name == word or name.split("_")[0] == word.zfill(2) for name in sources):
            raise ValueError(f"notebook {word!r} is unknown; there are: {', '.join(sources)}")
    return [n for n in sources if not only or n in only or n.split("_")[0] in {word.zfill(2) for word in only}]


def _parameters(
    sources: dict[str, Path],
    chosen: Sequence[str],
    settings: dict[str, Any],
    places: dict[str, str],
    overrides: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """What each chosen notebook is passed: places < common < its own section < overrides."""
    defaults = {name: declared(path) for name, path in sources.items()}
    everything = {key for known in defaults.values() for key in known}
    for words, where, known in [
        (settings["common"], "the section common", everything),
        (overrides, "the command", {key for name in chosen for key in defaults[name]}),
        *((settings.get(name, {}), f"the section {name}", set(defaults[name])) for name in sources),
    ]:
        check_names(words, sorted(known), where)
    passed = {}
    for name in chosen:
        given = places | settings["common"] | settings.get(name, {}) | overrides
        passed[name] = {
            key: read(kind(default), given[key], f"{name}: {key}")
            for key, default in defaults[name].items()
            if key in given
        }
    return passed


def kind(default: Any) -> Any:
    """The kind that a parameter's default stands for: text that is a number, such as "8/255", for any number."""
    if isinstance(default, list):
        kinds = {kind(part) for part in default}
        if len(kinds) > 1 and kinds <= {int, float, Written}:
            kinds = {Written}
        return list[kinds.pop()] if len(kinds) == 1 else list[Any]
    if isinstance(default, str):
        try:
            parse_number(default)
            return Written
        except ValueError:
            return str
    return Any if default is None else type(default)


def _executed_copy(root: Path, profile: str, name: str) -> Path:
    folder = root / "notebooks" if profile == DEFAULT else root / ".wdat" / profile / "notebooks"
    return folder / f"{name}.ipynb"


def _remove(root: Path, paths: Iterable[str], folder: Path) -> None:
    """Remove those of a notebook's earlier files that lie in this folder: they were made under other conditions."""
    stale = [path for path in map(root.joinpath, paths) if path.is_relative_to(folder) and path.is_file()]
    for path in stale:
        path.unlink()
    if stale:
        print(f"    removed {len(stale)} outdated file(s) from {relative(root, folder)}", flush=True)


def _claim_leftovers(root: Path, state: dict[str, Any], folders: Sequence[Path]) -> None:
    """Give the files of a run that was cut short to the notebook it was in, to be resumed or removed with it.

    A run stops at its first failure and there is only one at a time, so at most one notebook is concerned.
    """
    for name, entry in state.items():
        if "before" in entry:
            present = list(stamps(folders))
            owned = {path for other in state for path in state[other]["outputs"] if other != name} | set(
                entry["before"]
            )
            entry["outputs"] |= digests(root, [path for path in present if relative(root, path) not in owned])
            del entry["before"]


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
