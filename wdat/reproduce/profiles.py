"""What a profile says: which notebooks there are, who needs whom, and the parameters that each is passed."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from wdat.reproduce import execution
from wdat.settings import Written, check_names, parse_number, read

if TYPE_CHECKING:
    from nbformat import NotebookNode

DEFAULT = "digits"


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
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
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
    defaults = {}
    for line in ast.parse(_parameters_cell(source).source).body:
        try:
            (target,) = line.targets if isinstance(line, ast.Assign) else [line.target]
            defaults[target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError, TypeError):
            raise ValueError(
                f"{source.name}: `{ast.unparse(line)}` in the parameters cell is no plain literal"
            ) from None
    return defaults


def needed(sources: dict[str, Path]) -> dict[str, list[str]]:
    """The notebooks whose results each reads, itself or through others.

    By leading numbers, `needs=["00"]` beside the tag of its parameters cell; of one that does not say, all before it.
    ValueError for a number that no notebook before it has.
    """
    found: dict[str, list[str]] = {}
    for name, source in sources.items():
        numbers = {other.split("_")[0]: other for other in found}
        given = _parameters_cell(source).metadata.get("needs", list(numbers))
        if unknown := [number for number in given if number not in numbers]:
            known = ", ".join(numbers) or "none"
            raise ValueError(f"{source.name} needs {unknown[0]!r}; numbers of notebooks before it: {known}")
        direct = {numbers[number] for number in given}
        found[name] = [other for other in found if other in direct or any(other in found[one] for one in direct)]
    return found


def _parameters_cell(source: Path) -> "NotebookNode":
    cells = [c for c in execution.load(source).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{source.name} has {len(cells)} cells tagged parameters; it must have one")
    return cells[0]


def choose(sources: dict[str, Path], only: Sequence[str] | None) -> list[str]:
    """The notebooks named, by name or leading number, in their order; all without. ValueError for an unknown one."""
    for word in only or []:
        if not any(name == word or name.split("_")[0] == word.zfill(2) for name in sources):
            raise ValueError(f"notebook {word!r} is unknown; there are: {', '.join(sources)}")
    return [n for n in sources if not only or n in only or n.split("_")[0] in {word.zfill(2) for word in only}]


def parameters(
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


def places(profile: str, out: str | Path | None = None) -> dict[str, str]:
    """Folders, below the repository, of a profile's records (by default figures/PROFILE) and of its scratch files."""
    return {"out": str(out or f"figures/{profile}"), "work": f".wdat/{profile}/made"}


def executed_copy(root: Path, profile: str, name: str, out: str) -> Path:
    """Where the executed copy of a notebook lies: beside its source, those of other profiles beside the records."""
    return (root / "notebooks" if profile == DEFAULT else root / out) / f"{name}.ipynb"
