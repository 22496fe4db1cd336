"""`wdat check`: the first broken link between a page and the sources of its records is named."""

import json

import pytest
from repository import notebook

from wdat import cli
from wdat.reproduce import paper

HEAD = """# %% tags=["parameters"]
from_records = False
n = 1
networks = ["one.yaml"]
out = "figures/digits"
work = ".wdat/digits/made"

# %%
from wdat import records
path = records.root() / out / "01_first.json"
if not from_records:
    records.write(path, "number", {"n": n}, device="cpu")
"""
DRAW = "records.write_file(path.with_suffix(\".md\"), f\"n = {records.read(path)['results']['n']}\\n\")"


@pytest.fixture
def made(repo, monkeypatch):
    """A repository of one notebook that has run: a record, a table, a page and a paper."""
    monkeypatch.chdir(repo)
    monkeypatch.setattr(paper, "made", lambda root: b"pdf")
    monkeypatch.setattr("shutil.which", lambda name: name)
    for path in (repo / "notebooks").glob("0*.py"):
        path.unlink()
    notebook(repo, "01_first", DRAW, head=HEAD)
    (repo / "one.yaml").write_text("name: one\n")
    (repo / "README.md").write_text("<!-- wdat: figures/digits/01_first.md -->\n<!-- wdat: end -->\n")
    (repo / "paper").mkdir(exist_ok=True)
    (repo / "paper/wdat.pdf").write_bytes(b"pdf")
    assert cli.main(["reproduce"]) == 0
    record = repo / "figures/digits/01_first.json"
    said = json.loads(record.read_text())
    said["provenance"]["git"] = {"commit": "0" * 40, "dirty": False}  # whatever the tests themselves run from
    record.write_text(json.dumps(said))
    return repo


@pytest.mark.slow
def test_the_first_broken_link_is_named(made, capsys):
    def check() -> str:
        code = cli.main(["check"])
        said = capsys.readouterr()
        assert (code == 0) == ("every figure, table and number traces" in said.out)
        return said.err

    record, table = made / "figures/digits/01_first.json", made / "figures/digits/01_first.md"
    assert check() == "" and not (made / ".wdat/check/digits").exists()
    for path, other, words in (
        (table, "n = 9\n", "01_first.md: is not what its record gives"),
        (record, json.dumps({**json.loads(record.read_text()), "results": {"n": 7}}), "01_first.md: is not what"),
        (made / "one.yaml", "name: two\n", "01_first.json: its input one.yaml is another"),
        (made / "notebooks/profiles/digits.yaml", "common: {n: 5}\n", "the profile or the lock file has changed"),
        (made / "notebooks/01_first.py", HEAD.replace('{"n": n}', '{"n": n + 1}') + DRAW, "the code that computes it"),
        (made / "README.md", "<!-- wdat: figures/digits/01_first.md -->\n9\n<!-- wdat: end -->\n", "README.md: holds"),
        (made / "paper/wdat.pdf", "another", "wdat.pdf: is not what its sources give"),
    ):
        before = path.read_text()
        path.write_text(other)
        said = check()
        assert words in said, said
        path.write_text(before)
    (made / "figures/digits/02_old.md").write_text("by hand")
    assert "02_old.md: no notebook draws it" in check()
    (made / "figures/digits/02_old.md").unlink()
    said = json.loads(record.read_text())
    said["provenance"]["git"]["dirty"] = True
    record.write_text(json.dumps(said))
    assert "differed from the commit" in check()
    del said["provenance"]["made_of"]
    record.write_text(json.dumps(said))
    assert "does not say what it was made of" in check()
    assert cli.main(["check", "--profile", "nothing"]) == 2
