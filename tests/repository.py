"""Sources of tiny notebooks, and what was printed, for the tests of the runner; the fixture `repo` is made of them."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
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


def assert_they_end(processes: Sequence[psutil.Process], seconds: float = 2.0) -> None:
    """Within so many seconds; where more processes than cores want to run, in as many times more."""
    start, allowed = time.monotonic(), seconds * max(1.0, os.getloadavg()[0] / os.cpu_count())
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
        assert time.monotonic() - start < allowed, f"{allowed:.1f} seconds that a worker may stay"
        time.sleep(0.02)
