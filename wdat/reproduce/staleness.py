"""What a finished notebook depends on, and why it must run again."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wdat.digest import reached, text_digest
from wdat.reproduce.execution import load, relative
from wdat.reproduce.profiles import declared

SHOWN = {".pdf", ".png", ".tex", ".md"}  # drawn from records: outputs, but no later notebook's input
DRAWING = "wdat.report"  # reads records and changes no network


def key(
    root: Path, source: Path, passed: dict[str, Any], state: dict[str, Any], needs: Sequence[str]
) -> dict[str, Any]:
    """Digests and values of all that a notebook depends on.

    Its inputs are what `state` gives notebooks it needs, and the model cards that its parameters name.
    """
    cells = load(source).cells
    code = "\n...\n".join(cell.source for cell in cells if cell.cell_type == "code")  # cells do not flow together
    whole, definitions = reached(code)
    lock = root / "requirements.lock.txt"
    cards = [
        path for path in _strings(declared(source) | passed) if path.endswith(".yaml") and not path.startswith(".wdat/")
    ]
    return {
        "code": whole,
        "computing": reached(code, apart=DRAWING)[0],
        "definitions": definitions,  # only to say what has changed
        "text": text_digest("\0".join(cell.source for cell in cells)),
        "parameters": json.loads(json.dumps({k: v for k, v in passed.items() if k != "jobs"})),  # alters no number
        "lock": text_digest(lock.read_text(encoding="utf-8")) if lock.is_file() else None,
        "inputs": {
            path: _content(root / path)
            for other in needs
            for path in state.get(other, {"outputs": ()})["outputs"]
            if Path(path).suffix not in {*SHOWN, ".ipynb"} and (root / path).is_file()
        }
        | {path: _content(root / path) for path in sorted({*cards}) if (root / path).is_file()},
    }


def made_of(key: dict[str, Any]) -> dict[str, Any]:
    """What a record says it was made of: digests of code and parameters, and of every input."""
    said = text_digest(json.dumps({part: key[part] for part in ("parameters", "lock")}, sort_keys=True))
    return {"code": key["computing"], "parameters": said, "inputs": key["inputs"]}


def broken(root: Path, said: dict[str, Any] | None, key: dict[str, Any]) -> str | None:
    """Why a record made of this is not what the sources would make now, in words; None where it is.

    Inputs that are not there (networks that the run trained) are not judged.
    """
    if said is None:
        return "does not say what it was made of (it is older than that)"
    now = made_of(key)
    for part, words in (("code", "the code that computes it"), ("parameters", "the profile or the lock file")):
        if said[part] != now[part]:
            return f"{words} has changed since"
    differ = [path for path, sha in said["inputs"].items() if (root / path).is_file() and _content(root / path) != sha]
    return f"its input {differ[0]} is another" if differ else None


def reasons(root: Path, key: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """Why a notebook must run, in words; empty if it is up to date."""
    if not entry:
        return ["not run yet"]
    old = entry["key"]

    def changed(part: str) -> list[str]:
        return sorted(k for k in old[part].keys() | key[part].keys() if old[part].get(k) != key[part].get(k))

    reasons = [] if entry["done"] else ["not finished"]
    if old["code"] != key["code"]:
        reasons += _changed_code(old.get("definitions", {}), key["definitions"])
    shown = [
        f"{k}: {old['parameters'].get(k, 'unset')} → {key['parameters'].get(k, 'unset')}" for k in changed("parameters")
    ]
    reasons += [f"parameters changed ({', '.join(shown)})"] * bool(shown)
    reasons += ["requirements.lock.txt changed"] * (old["lock"] != key["lock"])
    reasons += [f"inputs changed: {_few(paths)}" for paths in [changed("inputs")] if paths]
    if entry["done"]:
        outputs = {path: _file_sha(root / path) for path in entry["outputs"]}
        missing = [path for path, sha in outputs.items() if sha is None]
        differ = [path for path, sha in outputs.items() if sha not in (None, entry["outputs"][path])]
        reasons += [f"output missing: {_few(missing)}"] * bool(missing) + [f"output changed: {_few(differ)}"] * bool(
            differ
        )
    return reasons or ["text changed"] * (old["text"] != key["text"])


def same_conditions(old: dict[str, Any] | None, new: dict[str, Any]) -> bool:
    """Whether scratch files made under the old key are good under the new one: all agrees but prose and drawing."""
    return old is None or all(old.get(part) == new[part] for part in ("computing", "parameters", "lock", "inputs"))


def _strings(value: Any) -> list[str]:
    """All texts in nested lists and dictionaries."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _strings(part)]


def digests(root: Path, paths: Sequence[Path]) -> dict[str, str]:
    """Relative path -> sha256 of the bytes, of those that exist."""
    return {relative(root, path): sha for path in sorted(set(paths)) if (sha := _file_sha(path))}


def stamps(folders: Sequence[Path]) -> dict[Path, tuple[int, int, int]]:
    """File -> time of change in ns, size in bytes, inode, of all in these folders: another stamp, written since.

    Files that other notebooks make and move meanwhile are looked at as they are found, and may be gone by then.
    Executed copies are left out: the runner knows whose they are.
    """
    found = {}
    for folder in folders:
        for place, _, names in os.walk(folder):
            for path in (Path(place, name) for name in names if not name.endswith((".part", ".ipynb"))):
                with contextlib.suppress(FileNotFoundError):
                    s = path.stat()
                    found[path] = s.st_mtime_ns, s.st_size, s.st_ino
    return found


def _changed_code(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Which code has changed, in words: what is new or different, or else what is missing."""
    names = [name for name, said in new.items() if said not in old.values()]
    names = names or [name for name, said in old.items() if said not in new.values()]
    library = [name for name in names if name]
    return ["code changed"] * ("" in names) + [f"library changed: {_few(library)}"] * bool(library) or ["code changed"]


def _content(path: Path) -> str | None:
    """Digest of what a file says: of a record, all but its provenance, which has dates and durations."""
    if path.suffix == ".json":
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return text_digest(json.dumps({k: v for k, v in record.items() if k != "provenance"}, sort_keys=True))
        except (ValueError, AttributeError):
            pass
    return _file_sha(path)


def _file_sha(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _few(words: Sequence[str], most: int = 3) -> str:
    return ", ".join(words[:most]) + f" and {len(words) - most} more" * (len(words) > most)
