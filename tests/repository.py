"""Sources of tiny notebooks, and what was printed, for the tests of the runner; the fixture `repo` is made of them."""

from pathlib import Path

import pytest

HEAD = """# %% [markdown]
# # A title

# %% tags=["parameters"]
n = 1  # images
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import json, os, sys
from pathlib import Path
root = Path.cwd().parent
out, work = root / out, root / work
"""


def notebook(root: Path, name: str, *cells: str, head: str = HEAD) -> Path:
    """Write a source with this head and these code cells; returns its path."""
    path = root / "notebooks" / f"{name}.py"
    path.write_text(head + "".join(f"\n# %%\n{cell}\n" for cell in cells))
    return path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed since the last look."""
    return capsys.readouterr().out
