"""Run the notebooks of a profile in order, headless, and resume where the last run stopped.

`notebooks/NN_name.py` is the source, `notebooks/profiles/<profile>.yaml` its settings: `common: {...}` for every
notebook that declares the parameter, one section per notebook name for its own, and `threads`. Figures go to
`figures/<profile>/`, scratch files (networks, checkpoints) to `.wdat/<profile>/made/`, the executed copies to
`notebooks/NN_name.ipynb` for the default profile and `.wdat/<profile>/notebooks/` for the others.

A notebook is done when it ran to its end, and stays done while its code, its parameters, the `wdat` modules it
imports (comments and docstrings apart), the lock file, its outputs and the records and scratch files of the notebooks
before it are the same. A run cut short is taken up with its scratch files; under other conditions they are removed
first, so that nothing old is picked up. Data and weights from elsewhere are not watched: `force` when they change.
"""

import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from wdat import records

if TYPE_CHECKING:
    from nbformat import NotebookNode

DEFAULT = "digits"
DRAWING = ("wdat/rows.py", "wdat/plots.py", "wdat/tables.py")  # read records and change no network
SHOWN = {".pdf", ".png", ".tex", ".md"}  # drawn from records: outputs, but no later notebook's input


class CellFailed(Exception):
    """A notebook stopped; the message names it, the cell and the exception, and where the rest can be read."""


def reproduce(
    profile: str = DEFAULT,
    only: Sequence[str] | None = None,
    force: bool = False,
    root: str | Path | None = None,
    out: str | Path | None = None,
    parameters: dict[str, Any] | None = None,
    threads: int | None = None,
) -> list[str]:
    """Run what is not done yet; returns the names of the notebooks that ran.

    Args:
        profile: a file in notebooks/profiles, without its ending.
        only: notebooks by name or leading number ("02"); the others are left alone.
        force: run them even if they are done.
        root: the repository (default: found from the working folder upward).
        out: folder of figures, tables and records (default: figures/<profile>).
        parameters: override the profile in every notebook that declares them.
        threads: of the kernel (default: the profile's, or 1: two busy threads can be far slower than one).

    Raises ValueError for an unknown profile, notebook or parameter, OSError for a folder that cannot be written, both
    before anything runs; `CellFailed` when a notebook stops. Run again after either: finished notebooks are kept.
    """
    root = records.root() if root is None else Path(root).absolute()
    sources = notebooks(root)
    settings = read_profile(root, profile, sources)
    chosen = _choose(sources, only)
    scratch = root / ".wdat" / profile
    places = {"out": str(out or f"figures/{profile}"), "work": f".wdat/{profile}/made"}
    passed = _parameters(sources, chosen, settings, places, parameters or {})
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
            key = _key(root, sources, name, passed[name], state)
            reasons = ["forced"] * force or _reasons(root, key, state.get(name, {}))
            if not reasons:
                print(f"{label}: up to date", flush=True)
                continue
            print(f"{label} … ({'; '.join(reasons)})", flush=True)
            if reasons == ["text changed"]:
                records.write_file(executed[name], _tidy(_with_new_text(sources[name], executed[name]), root))
                state[name] |= {"key": key, "outputs": state[name]["outputs"] | _digests(root, [executed[name]])}
                _save_state(scratch, state)
                continue
            old = state.get(name, {"key": None, "outputs": {}})
            before, begun = _stamps(folders[name]), time.perf_counter()
            if fresh := force or not _same_conditions(old["key"], key):
                _remove(root, old["outputs"], folders[name][1])
            present = [_relative(root, path) for path in before]
            state[name] = {"key": key, "done": False, "outputs": old["outputs"], "before": present}
            _save_state(scratch, state)
            command = f"wdat reproduce --profile {profile} --only {name[:2]}"
            kernel = _kernel(scratch, threads or settings["threads"], command)
            _execute(sources[name], executed[name], passed[name], scratch, kernel, root)
            seconds = time.perf_counter() - begun
            written = [path for path, stamp in _stamps(folders[name]).items() if before.get(path) != stamp]
            if fresh:
                _remove(root, set(old["outputs"]) - {_relative(root, path) for path in written}, folders[name][0])
            outputs = _digests(root, [*(root / path for path in old["outputs"]), *written, executed[name]])
            for other in state.values():  # a file belongs to the notebook that wrote it last
                other["outputs"] = {path: sha for path, sha in other["outputs"].items() if path not in outputs}
            state[name] = {"key": key, "done": True, "outputs": outputs, "seconds": round(seconds, 1)}
            _save_state(scratch, state)
            ran.append(name)
            print(f"{label} done in {_clock(seconds)}, {_clock(time.perf_counter() - started)} in all", flush=True)
    return ran


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
    known = ["common", "threads", *sources]
    if not isinstance(settings, dict) or (unknown := [key for key in settings if key not in known]):
        seen = repr(unknown[0]) if isinstance(settings, dict) else "no mapping"
        raise ValueError(f"{path} has {seen}; its sections are: {', '.join(known)}")
    return {"common": {}, "threads": 1} | {key: value or {} for key, value in settings.items()}


def declared(source: Path) -> dict[str, Any]:
    """Names and defaults in the one cell tagged `parameters`; ValueError unless it holds plain literals only.

    Parsed rather than matched line by line, so that values over several lines count too.
    """
    cells = [c for c in _load(source).cells if "parameters" in c.metadata.get("tags", [])]
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


def _load(source: Path) -> "NotebookNode":
    import jupytext

    return jupytext.read(source)


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
        (settings["common"], "common section", everything),
        (overrides, "command", {key for name in chosen for key in defaults[name]}),
        *((settings.get(name, {}), f"section {name}", set(defaults[name])) for name in sources),
    ]:
        if unknown := sorted(set(words) - known):
            raise ValueError(f"parameter {unknown[0]!r} in the {where} is unknown; known: {', '.join(sorted(known))}")
    passed = {}
    for name in chosen:
        given = places | settings["common"] | settings.get(name, {}) | overrides
        passed[name] = {
            key: _like(default, given[key], f"{name}: {key}") for key, default in defaults[name].items() if key in given
        }
    return passed


def _like(default: Any, value: Any, where: str) -> Any:
    """The value as the notebook expects it: YAML reads 1e-3 as text, and a list is no single value."""
    if isinstance(default, (list, dict)) != isinstance(value, (list, dict)) and None not in (default, value):
        raise ValueError(f"parameter {where} is {value!r}, but its default is {default!r}; pass the same kind of value")
    if isinstance(default, (int, float)) and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value  # such as "8/255"
    return value


def _executed_copy(root: Path, profile: str, name: str) -> Path:
    folder = root / "notebooks" if profile == DEFAULT else root / ".wdat" / profile / "notebooks"
    return folder / f"{name}.ipynb"


# What a finished notebook depends on


def _key(
    root: Path, sources: dict[str, Path], name: str, passed: dict[str, Any], state: dict[str, Any]
) -> dict[str, Any]:
    cells = _load(sources[name]).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    lock = root / "requirements.lock.txt"
    earlier = [other for other in sources if other < name and other in state]
    return {
        "code": _sha("\0".join(code)),
        "text": _sha("\0".join(cell.source for cell in cells if cell.cell_type != "code")),
        "parameters": json.loads(json.dumps(passed)),
        "library": library("\n".join(code)),
        "lock": _sha(lock.read_text(encoding="utf-8")) if lock.is_file() else None,
        "inputs": {
            path: _content(root / path)
            for other in earlier
            for path in state[other]["outputs"]
            if Path(path).suffix not in {*SHOWN, ".ipynb"} and (root / path).is_file()
        },
    }


def library(code: str) -> dict[str, str]:
    """Module file -> digest, for every `wdat` module that this code imports, directly or through others.

    Digests are of the parsed code without docstrings, so that comments and layout do not count. Code that imports
    `wdat` itself, or something from it that is no module, is taken to reach every module.
    """
    package = Path(__file__).parent
    modules = {path.stem for path in package.glob("*.py")}
    code = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines())  # magics
    waiting, digests = _imports(ast.parse(code), modules), {}
    while waiting:
        module = waiting.pop()
        tree = ast.parse((package / f"{module}.py").read_text(encoding="utf-8"))
        digests[module] = _sha(ast.dump(_bare(tree)))
        waiting |= _imports(tree, modules) - set(digests)
    return {f"wdat/{module}.py": digests[module] for module in sorted(digests)}


def _imports(tree: ast.AST, modules: set[str]) -> set[str]:
    """Modules of wdat that a piece of code imports itself, with the package's __init__ if there are any."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "wdat"]
            found |= {name.split(".")[1] for name in names if "." in name}
            found |= modules if "wdat" in names else set()
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wdat":
            names = {alias.name for alias in node.names}
            found |= {node.module.split(".")[1]} if "." in node.module else names if names <= modules else modules
    return (found | {"__init__"}) & modules if found else found


def _bare(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def _reasons(root: Path, key: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """Why a notebook must run, in words; empty if it is up to date."""
    if not entry:
        return ["not run yet"]
    old = entry["key"]

    def changed(part: str) -> list[str]:
        return sorted(k for k in old[part].keys() | key[part].keys() if old[part].get(k) != key[part].get(k))

    reasons = [] if entry["done"] else ["not finished"]
    reasons += ["code changed"] * (old["code"] != key["code"])
    shown = [
        f"{k}: {old['parameters'].get(k, 'unset')} → {key['parameters'].get(k, 'unset')}" for k in changed("parameters")
    ]
    reasons += [f"parameters changed ({', '.join(shown)})"] * bool(shown)
    reasons += [f"library changed: {', '.join(modules)}" for modules in [changed("library")] if modules]
    reasons += ["requirements.lock.txt changed"] * (old["lock"] != key["lock"])
    reasons += [f"earlier results changed: {_few(paths)}" for paths in [changed("inputs")] if paths]
    if entry["done"]:
        outputs = {path: _file_sha(root / path) for path in entry["outputs"]}
        missing = [path for path, sha in outputs.items() if sha is None]
        differ = [path for path, sha in outputs.items() if sha not in (None, entry["outputs"][path])]
        reasons += [f"output missing: {_few(missing)}"] * bool(missing) + [f"output changed: {_few(differ)}"] * bool(
            differ
        )
    return reasons or ["text changed"] * (old["text"] != key["text"])


def _few(words: Sequence[str], most: int = 3) -> str:
    return ", ".join(words[:most]) + f" and {len(words) - most} more" * (len(words) > most)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sha(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(path: Path) -> str | None:
    """Digest of what a file says: of a record, all but its provenance, which has dates and durations."""
    if path.suffix == ".json":
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return _sha(json.dumps({k: v for k, v in record.items() if k != "provenance"}, sort_keys=True))
        except (ValueError, AttributeError):
            pass
    return _file_sha(path)


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _digests(root: Path, paths: Sequence[Path]) -> dict[str, str]:
    return {_relative(root, path): sha for path in sorted(set(paths)) if (sha := _file_sha(path))}


def _stamps(folders: Sequence[Path]) -> dict[Path, tuple[int, int, int]]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (s.st_mtime_ns, s.st_size, s.st_ino) for path in files for s in [path.stat()]}


def _same_conditions(old: dict[str, Any] | None, new: dict[str, Any]) -> bool:
    """Whether scratch files made under the old key are good under the new one: all agrees but prose and drawing."""

    def essence(key: dict[str, Any]) -> dict[str, Any]:
        library = {path: sha for path, sha in key["library"].items() if path not in DRAWING}
        return {part: value for part, value in key.items() if part != "text"} | {"library": library}

    return old is None or essence(old) == essence(new)


def _remove(root: Path, paths: Iterable[str], folder: Path) -> None:
    """Remove those of a notebook's earlier files that lie in this folder: they were made under other conditions."""
    stale = [path for path in map(root.joinpath, paths) if path.is_relative_to(folder) and path.is_file()]
    for path in stale:
        path.unlink()
    if stale:
        print(f"    removed {len(stale)} outdated file(s) from {_relative(root, folder)}", flush=True)


def _claim_leftovers(root: Path, state: dict[str, Any], folders: Sequence[Path]) -> None:
    """Give the files of a run that was cut short to the notebook it was in, to be resumed or removed with it.

    A run stops at its first failure and there is only one at a time, so at most one notebook is concerned.
    """
    for name, entry in state.items():
        if "before" in entry:
            present = list(_stamps(folders))
            owned = {path for other in state for path in state[other]["outputs"] if other != name} | set(
                entry["before"]
            )
            entry["outputs"] |= _digests(root, [path for path in present if _relative(root, path) not in owned])
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


# Execution


def _execute(
    source: Path,
    executed: Path,
    passed: dict[str, Any],
    scratch: Path,
    kernel: AbstractContextManager[type],
    root: Path,
) -> None:
    """Run one notebook in a fresh kernel, in the folder of its source as Jupyter would; put its copy in place."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    partial = scratch / "notebooks" / f"{source.stem}.partial.ipynb"
    partial.parent.mkdir(parents=True, exist_ok=True)
    relay = _relay(sys.stdout)
    saved = f"as far as it ran: {_relative(root, partial)}; mend the cause and run the same command to go on"
    with kernel as manager:
        try:
            notebook = papermill.execute_notebook(
                _load(source),
                partial,
                parameters=passed,
                kernel_name="python3",
                language="python",
                kernel_manager_class=manager,
                cwd=source.parent,
                progress_bar=False,
                stdout_file=relay,
                stderr_file=relay,
                coalesce_streams=True,
            )
        except PapermillExecutionError as error:
            where = f"{source.stem} failed in cell [{error.exec_count}], {_failing_line(error)}"
            raise CellFailed(f"{where}: {error.ename}: {_first_line(error.evalue)}\n{saved}") from None
        except (RuntimeError, TimeoutError) as error:  # what nbclient raises for a kernel that died or never came up
            reason = f"{type(error).__name__}: {_first_line(str(error))}"
            raise CellFailed(f"{source.stem} stopped with its kernel ({reason}; out of memory?)\n{saved}") from None
    records.write_file(executed, _tidy(notebook, root))
    partial.unlink()


def _failing_line(error: Any) -> str:
    """The line of the cell that raised, from the traceback; the cell's first line if there is none (bad syntax)."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    if arrow := re.search(r"-+> *(\d+) (.*)", plain):
        return f"line {arrow[1]} `{arrow[2].strip()[:80]}`"
    return f"`{_first_line(error.source)[:80]}`"


def _first_line(text: str) -> str:
    return next((line.strip()[:400] for line in text.splitlines() if line.strip()), "")


@contextmanager
def _kernel(scratch: Path, threads: int, command: str) -> Iterator[type]:
    """A kernel manager class for this very interpreter that opens no port and writes nothing to the user's home."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    folder = tempfile.mkdtemp(prefix="wdat-")
    if len(folder) > 60:  # the path of a socket must stay below 108 characters
        shutil.rmtree(folder)
        folder = tempfile.mkdtemp(prefix="wdat-", dir="/tmp")
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "IPYTHONDIR": f"{folder}/ipython",
        "JUPYTER_RUNTIME_DIR": folder,
        "JUPYTER_DATA_DIR": folder,
        "JUPYTER_CONFIG_DIR": folder,
        "MPLCONFIGDIR": str(scratch.parent / "matplotlib"),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm would advise to install widgets
        "WDAT_COMMAND": command,
    }

    class Manager(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, env=environment, display_name="Python 3", language="python")

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments, transport="ipc", connection_file=f"{folder}/kernel.json")

    try:
        yield Manager
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _relay(stream: TextIO, every: float = 20.0) -> SimpleNamespace:
    """A file that passes on what a notebook prints; of progress bars the last state, in a log only now and then."""
    last = time.monotonic()
    live = stream.isatty()

    def write(text: str) -> None:
        nonlocal last
        if "\r" in text:
            bar = text.rstrip().split("\r")[-1].strip()
            if live:
                stream.write(f"\r\033[K    {bar}")
            elif bar and time.monotonic() - last > every:
                last = time.monotonic()
                stream.write(f"    {bar}\n")
        else:
            lines = [line for line in text.splitlines() if line.strip()]
            stream.write("".join(("\r\033[K" if live else "") + f"    {line}\n" for line in lines))
        stream.flush()

    return SimpleNamespace(write=write, flush=stream.flush)


def _tidy(notebook: "NotebookNode", root: Path) -> str:
    """The executed notebook as text fit to commit: no machine's paths, no clock times, no progress bars."""
    import nbformat

    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags" and v})
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                output.text = re.sub(r"[^\n]*\d+%\|[^\n]*\n?|[^\n]*\d+(\.\d+)?(it/s|s/it)\][^\n]*\n?", "", output.text)
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]
    text = nbformat.writes(notebook, version=4)
    for path in {str(root), os.path.realpath(root)}:
        text = text.replace(f"{path}/", "").replace(path, ".")
    text = re.sub(r"[\w/.~-]*/site-packages/", "site-packages/", text)
    if sys.prefix.count("/") > 1:  # an environment, not /usr
        text = text.replace(sys.prefix, ".venv")
    if len(home := str(Path.home())) > 1:
        text = text.replace(f"{home}/", "~/")
    return re.sub(r"[\w/.-]*/ipykernel_\d+/\d+\.py", "<cell>", text) + "\n"


def _with_new_text(source: Path, executed: Path) -> "NotebookNode":
    """The source's prose around the code and outputs of the executed copy, when only prose has changed."""
    import nbformat

    old = nbformat.read(executed, as_version=4)
    ran = iter([c for c in old.cells if c.cell_type == "code"])
    cells = []
    for cell in _load(source).cells:
        cells.append(next(ran) if cell.cell_type == "code" else cell)
        if "parameters" in cell.metadata.get("tags", []):
            following = next(ran)
            if "injected-parameters" in following.metadata.get("tags", []):
                cells.append(following)
            else:
                ran = iter([following, *ran])
    old.cells = cells
    return old


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
