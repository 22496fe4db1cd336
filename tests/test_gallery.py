"""The page of the notebooks shows each of them with a picture that is there."""

import re
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PAGE = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")


def test_every_notebook_is_in_the_gallery_with_its_picture():
    cells = [cell for line in PAGE.splitlines() if line.startswith("| [") for cell in line.split(" | ") if "](" in cell]
    linked = [re.search(r"\[(\d\d) .*?\]\((\w+)\.(?:ipynb|py)\)", cell) for cell in cells]
    assert [link[2] for link in linked] == sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.py"))
    for cell, link in zip(cells, linked, strict=True):
        assert link[2].startswith(link[1])
        pictures = re.findall(r"!\[\]\((.*?)\)", cell)
        assert pictures
        for picture in pictures:
            assert (NOTEBOOKS / picture).is_file() and Path(picture).name.startswith(link[1])
