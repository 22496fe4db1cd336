"""The wheel alone, in an empty folder outside the repository: five lines and a figure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = """
import torch, wdat
from wdat.report import figures
data = wdat.load_data("digits", "test", n=60)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
tuned = wdat.finetune(model, wdat.load_data("digits", "train", n=300), wdat.Recipe({"kind": "plain"}, epochs=5)).model
found = wdat.evaluate(tuned, data, ["1/16"], losses=["ce", "redlr"], steps=5, curve=21)
path = wdat.records.write("mine/net.json", "evaluation", {"n": 60, "networks": [{"network": "mine", **found}]})
figures.bracket(path)
print(wdat.__file__, len(wdat.frame(path)))
"""


@pytest.mark.slow
def test_a_wheel_works_from_an_empty_folder(tmp_path):
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    shutil.copytree(ROOT / "wdat", source / "wdat", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *built], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    empty.mkdir()
    told = {**os.environ, "PYTHONPATH": str(site)}

    def ran(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=empty, env=told, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    place, rows = ran("-c", LINES).split()
    assert Path(place).is_relative_to(site) and int(rows) == 4  # clean, two losses, optimal allocation
    assert (empty / "mine/net-bracket-linf.png").stat().st_size > 3000
    script = site / "bin" / "wdat"
    assert "evaluate" in ran(str(script), "--help")
