"""What CONTRIBUTING.md shows runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

import wdat

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_what_the_page_shows_runs(code, tiny_model, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (x, y), names = tiny_data, {"wdat": wdat, "torch": torch, "model": tiny_model}
    keep = y < 4
    names |= {"x": x[keep], "y": y[keep]}
    exec(code, names)
    if "found" in names:
        assert names["found"].distance <= 1 / 16 + 1e-6 and 0 <= names["found"].accuracy <= 1
    if "tuned" in names:
        assert all(weight.isfinite().all() for weight in names["tuned"].parameters())
    if "data" in names:
        assert len(names["data"]) == int(keep.sum())
    if "results" in names:
        assert names["results"]["accuracy"] == [1.0, 0.5]


def test_the_map_names_every_room():
    rooms = {path.parent.name for path in Path(wdat.__file__).parent.glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"`wdat/(\w+)/`", PAGE))
