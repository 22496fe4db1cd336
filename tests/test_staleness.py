"""What makes a finished notebook run again, and what does not."""

import json

from repository import HEAD, notebook, said

from wdat import digest
from wdat.reproduce import staleness
from wdat.reproduce.runner import reproduce


def test_every_rerun_says_why(repo, pretend, capsys, monkeypatch):
    def again(why: str, ran: list[str], **arguments) -> None:
        assert reproduce(**arguments) == ran
        assert why in said(capsys)

    first, profile = repo / "notebooks/01_first.py", repo / "notebooks/profiles/digits.yaml"
    again("[1/2] 01_first … (not run yet)", ["01_first", "02_second"])
    again("[2/2] 02_second: up to date", [])
    again("(forced)", ["02_second"], only=["02"], force=True)
    profile.write_text("common: {n: 2}\n01_first: {n: 3}\n")
    again("01_first … (parameters changed (n: 2 → 3))", ["01_first"])
    again("parameters changed (n: 3 → 4)", ["01_first", "02_second"], parameters={"n": 4})
    reproduce()
    first.write_text(first.read_text() + "\nprint()\n")
    again("01_first … (code changed)", ["01_first"])
    (repo / "figures/digits/a.json").unlink()
    again("01_first … (output missing: figures/digits/a.json)", ["01_first"])
    (repo / "figures/digits/b.json").write_text("by hand")
    again("02_second … (output changed: figures/digits/b.json)", ["02_second"])
    (repo / "requirements.lock.txt").write_text("torch==0\n")
    again("requirements.lock.txt changed", ["01_first", "02_second"])
    pretend["01_first"]["figures/digits/a.json"] = "2"
    again("01_first … (forced)", ["01_first"], only=["01"], force=True)
    again("02_second … (earlier results changed: figures/digits/a.json)", ["02_second"])
    notebook(repo, "01_first", "from wdat import records", head=HEAD)
    reproduce()
    library = staleness.library
    monkeypatch.setattr(staleness, "library", lambda code: {k: "new" for k in library(code) if "records" in k})
    again("01_first … (library changed: wdat/__init__.py, wdat/clock.py, wdat/records.py)", ["01_first"])


def test_what_only_the_provenance_of_a_record_says_changes_nothing_downstream(repo, pretend, capsys):
    record = {"results": 1, "provenance": {"date": "today"}}
    pretend["01_first"]["figures/digits/a.json"] = json.dumps(record)
    reproduce()
    pretend["01_first"]["figures/digits/a.json"] = json.dumps(record | {"provenance": {"date": "tomorrow"}})
    assert reproduce(only=["01"], force=True) == ["01_first"]
    assert reproduce() == []
    pretend["01_first"]["figures/digits/a.json"] = json.dumps(record | {"results": 2})
    assert reproduce(only=["01"], force=True) == ["01_first"]
    assert reproduce() == ["02_second"]
    assert "earlier results changed: figures/digits/a.json" in said(capsys)


def test_files_of_other_conditions_are_removed_and_those_of_a_resumed_run_kept(repo, pretend, capsys, monkeypatch):
    network, figure = repo / ".wdat/digits/made/network.pt", repo / "figures/digits/a-old.pdf"
    files = dict(pretend["01_first"])
    pretend["01_first"] |= {".wdat/digits/made/network.pt": "weights", "figures/digits/a-old.pdf": "drawn"}
    reproduce()
    pretend["01_first"] = files  # from now on the network would be found, and not trained again
    (repo / "figures/digits/a.json").unlink()
    assert reproduce() == ["01_first"] and network.exists() and figure.exists()
    library = staleness.library
    monkeypatch.setattr(staleness, "library", lambda code: library(code) | {"wdat/report/figures/methods.py": "new"})
    assert reproduce(only=["1"]) == ["01_first"] and network.exists()  # drawing changes no network
    said(capsys)
    assert reproduce(parameters={"n": 7}, only=["1"]) == ["01_first"]
    assert "removed 1 outdated file(s) from .wdat/digits/made\n" in said(capsys)
    assert not network.exists() and not figure.exists()
    assert (repo / "figures/digits/b.json").exists() and (repo / "figures/digits/a.json").exists()


def test_the_library_of_a_notebook_is_what_its_imports_reach(tmp_path, monkeypatch):
    package = tmp_path / "wdat"
    (package / "room").mkdir(parents=True)
    sources = {
        "__init__": '"""Doc."""\n',
        "room/__init__": '"""A room."""\n',
        "room/low": "x = 1\n",
        "high": "from wdat.room.low import x\n",
        "lazy": "def f():\n    import wdat.room.low\n    return wdat.room.low.x\n",
        "apart": "y = 2\n",
    }
    for name, text in sources.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(digest, "__file__", str(package / "digest.py"))

    def modules(code: str) -> set[str]:
        return {name.removeprefix("wdat/").removesuffix(".py") for name in digest.library(code)}

    below = {"__init__", "room/__init__", "room/low"}
    assert modules("import math") == set()
    assert modules("from wdat import high") == modules("import wdat.high as h") == {"high", *below}
    assert modules("from wdat.room import low") == modules("from wdat.room.low import x") == below
    assert modules("%matplotlib inline\nfrom wdat.lazy import f") == {"lazy", *below}
    assert modules("import wdat") == modules("from wdat import evaluate") == set(sources)
    before, version = digest.library("from wdat import high"), digest.version.__wrapped__  # not remembered
    high, apart = version("wdat.high"), version("wdat.apart")
    (package / "room" / "low.py").write_text('"""Now with a docstring."""\n# and a comment\nx  =  1\n')
    assert digest.library("from wdat import high") == before and version("wdat.high") == high
    (package / "room" / "low.py").write_text("x = 2\n")
    assert {k for k, v in digest.library("from wdat import high").items() if v != before[k]} == {"wdat/room/low.py"}
    assert version("wdat.high") != high and version("wdat.apart") == apart != high
