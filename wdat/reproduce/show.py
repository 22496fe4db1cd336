"""Show a profile's notebooks from the records that are there: executed copies and drawings anew, in seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wdat import records
from wdat.reproduce import execution, profiles, runner
from wdat.reproduce.screen import Screen
from wdat.reproduce.staleness import SHOWN, digests


def show(
    profile: str = profiles.DEFAULT,
    only: Sequence[str] | None = None,
    root: str | Path | None = None,
    out: str | Path | None = None,
    parameters: dict[str, Any] | None = None,
    copies: Path | None = None,
) -> list[str]:
    """Execute notebooks with `from_records`, which compute nothing; returns their names.

    What a run left to resume from is not touched, records stay as they are, and what is up to date stays so; figures,
    tables and executed copies are written again, the copies in the folder `copies` if one is named. Other arguments
    and errors as of `runner.reproduce`; a notebook of which nothing is recorded is left out.
    """
    root = records.root() if root is None else Path(root).absolute()
    sources = profiles.notebooks(root)
    settings, chosen = profiles.read_profile(root, profile, sources), profiles.choose(sources, only)
    scratch = root / ".wdat" / profile
    places = profiles.places(profile, out)
    passed = profiles.parameters(sources, chosen, settings, places, {**(parameters or {}), "from_records": True})
    scratch.mkdir(parents=True, exist_ok=True)
    with runner._one_run_at_a_time(scratch, profile):
        state = runner._read_state(scratch / "state.json")
        recorded = [name for name in chosen if any((root / places["out"]).glob(f"{name[:2]}_*.json"))]
        for name in chosen:
            if name not in recorded:
                print(f"{name}: nothing is recorded yet", flush=True)
                continue
            print(f"{name} …", flush=True)
            told = {"WDAT_COMMAND": f"wdat reproduce --profile {profile} --from-records"}
            copy = copies / f"{name}.ipynb" if copies else profiles.executed_copy(root, profile, name, places["out"])
            execution.execute(sources[name], copy, passed[name], scratch, told, root, Screen())
            if name in state and copies is None:  # what was drawn again is as good as what the run drew
                drawn = [root / path for path in state[name]["outputs"] if Path(path).suffix in {*SHOWN, ".ipynb"}]
                state[name]["outputs"] |= digests(root, drawn)
                runner._save_state(scratch, state)
    return recorded
