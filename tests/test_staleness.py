"""What makes a finished notebook run again, and what does not."""

import json

import pytest
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
    again("02_second … (inputs changed: figures/digits/a.json)", ["02_second"])
    reached = staleness.reached

    def other(code: str, apart: str = "") -> tuple[str, dict[str, str]]:
        _, definitions = reached(code, apart)
        return "new", {name: "new" if name == "wdat.records.read" else one for name, one in definitions.items()}

    notebook(repo, "01_first", "from wdat import records\nrecords.read", head=HEAD)
    again("01_first … (code changed; library changed: ", ["01_first"])
    monkeypatch.setattr(staleness, "reached", other)
    again("01_first … (library changed: wdat.records.read)", ["01_first"], only=["01"])


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
    assert "inputs changed: figures/digits/a.json" in said(capsys)


def test_files_of_other_conditions_are_removed_and_those_of_a_resumed_run_kept(repo, pretend, capsys, monkeypatch):
    network, figure = repo / ".wdat/digits/made/network.pt", repo / "figures/digits/a-old.pdf"
    files = dict(pretend["01_first"])
    pretend["01_first"] |= {".wdat/digits/made/network.pt": "weights", "figures/digits/a-old.pdf": "drawn"}
    reproduce()
    pretend["01_first"] = files  # from now on the network would be found, and not trained again
    (repo / "figures/digits/a.json").unlink()
    assert reproduce() == ["01_first"] and network.exists() and figure.exists()
    reached = staleness.reached
    drawing = lambda code, apart="": reached(code, apart) if apart else ("new", {"wdat.report.figures.rank": "new"})  # noqa: E731
    monkeypatch.setattr(staleness, "reached", drawing)
    assert reproduce(only=["1"]) == ["01_first"] and network.exists()  # drawing changes no network
    said(capsys)
    assert reproduce(parameters={"n": 7}, only=["1"]) == ["01_first"]
    assert "removed 1 outdated file(s) from .wdat/digits/made\n" in said(capsys)
    assert not network.exists() and not figure.exists()
    assert (repo / "figures/digits/b.json").exists() and (repo / "figures/digits/a.json").exists()


LIBRARY = {
    "__init__": """import importlib
def __getattr__(name): return getattr(importlib.import_module("wdat.main"), name)
""",
    "room/__init__": "from wdat.room.low import scaled\n",
    "room/low": """import math
from math import sqrt
RATE = 0.5
TABLE = {"half": None}
LOW, HIGH = 1, 2
def kept(function): return function
def _norm(x, power, *, root=True):
    total = sum(one ** power for one in x)
    return sqrt(total) if root else total
def scaled(x, rate: float = RATE):
    \'\'\'Scale.\'\'\'
    parts = [rate * one for one in x]
    return _norm(parts, 2, root=False)
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)
@kept
def decorated(x): return x + HIGH
class Ball:
    \'\'\'A ball.\'\'\'
    radius: float = 1.0
    def cost(self, x): return scaled(x) / self.radius
    def unused(self): return LOW
""",
    "main": """from wdat.room import low
from wdat.room.low import Ball, even
CHOICES = {"even": even, "scaled": low.scaled}
def run(name, x): return CHOICES[name](x)
def lazy(x):
    from wdat.room.low import decorated
    return decorated(x)
def ball(x): return Ball().cost(x)
def whole(name): return getattr(low, name)
def apart(): return 1
""",
    "acting": "import wdat.effect\ndef act(): return 0\n",
    "star": "from wdat.room.low import *\ndef starred(x): return scaled(x)\n",
    "effect": "import math\nSTATE = {}\nSTATE['pi'] = math.pi\n",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package in which texts can be replaced; what is asked of it comes from the files as they are then."""

    def replace(file: str, old: str = "", new: str = "") -> None:
        path = tmp_path / "wdat" / f"{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else LIBRARY[file]
        assert old in text
        path.write_text(text.replace(old, new))

    for file in LIBRARY:
        replace(file)
    monkeypatch.setattr(digest, "__file__", str(tmp_path / "wdat/digest.py"))
    return replace


ALL = "run, lazy, ball, apart"
SAME = {
    "a docstring": ("room/low", "Scale.", "Scale it, and say so."),
    "a comment and the layout": ("room/low", "RATE = 0.5", "# how much\nRATE  =  (0.5)"),
    "the order of definitions": ("room/low", "LOW, HIGH = 1, 2\ndef kept(function): return function\n",
                                 "def kept(function): return function\nLOW, HIGH = 1, 2\n"),
    "an annotation": ("room/low", "def odd(n)", "def odd(n: int) -> bool"),
    "a renamed function": ("room/low", "_norm", "_length"),
    "a renamed constant": ("room/low", "RATE", "SHARE"),
    "a renamed argument": ("room/low", "power", "exponent"),
    "an argument that is passed by name": ("room/low", "root", "rooted"),
    "a renamed variable": ("room/low", "parts", "terms"),
    "a renamed function of a circle": ("room/low", "odd(", "uneven("),
    "another way to import": ("main", "from wdat.room.low import decorated\n    return decorated(x)",
                              "import wdat.room.low as below\n    return below.decorated(x)"),
    "what nobody uses": ("room/low", "RATE = 0.5", "RATE = 0.5\ndef other(): return math.pi"),
}  # fmt: skip
OTHER = {
    "a constant": ("room/low", "RATE = 0.5", "RATE = 0.25", "run, ball", "lazy, apart"),
    "a default": ("room/low", "root=True", "root=None", "run, ball", "lazy, apart"),
    "an operator": ("room/low", "rate * one", "rate / one", "run, ball", "lazy, apart"),
    "a number": ("room/low", "n - 1", "n - 2", "run", "lazy, ball, apart"),
    "within a circle": ("room/low", "n != 0 and", "n == 1 and", "run", "lazy, ball, apart"),
    "a decorator": ("room/low", "@kept", "@staticmethod", "lazy", "run, ball, apart"),
    "what a decorator does": ("room/low", "return function", "return None", "lazy", "run, ball, apart"),
    "a decorated argument": ("room/low", "decorated(x): return x", "decorated(y): return y", "lazy", "run, ball"),
    "what an import stands for": ("room/low", "from math import sqrt", "from cmath import sqrt", "run, ball", "lazy"),
    "another method of a class": ("room/low", "return LOW", "return HIGH", "ball", "run, lazy, apart"),
    "a field's annotation": ("room/low", "radius: float", "radius: int", "ball", "run, lazy, apart"),
    "a function in a dictionary": ("main", '"even": even', '"even": ball', "run", "lazy, ball, apart"),
    "the signature of a function in a dictionary": ("room/low", "x, rate: float", "x, rate: int", "run", "lazy, ball"),
    "two arguments exchanged, not where they are named": (
        "room/low", "_norm(x, power, *, root=True)", "_norm(x, root=True, *, power)", "run, ball", "lazy, apart"
    ),
    "what is nowhere named but in a module that is": ("room/low", '"half"', '"third"', "whole", ALL),
}  # fmt: skip


def digests_of(names: str) -> dict[str, str]:
    return {name: digest.reached(f"from wdat.main import {name}\n{name}")[0] for name in names.split(", ")}


@pytest.mark.parametrize("what", SAME)
def test_what_alters_no_number_alters_no_digest(library, what):
    before = digests_of(ALL), digest.version.__wrapped__("wdat.main.run")
    library(*SAME[what])
    assert (digests_of(ALL), digest.version.__wrapped__("wdat.main.run")) == before


def test_a_name_that_leads_to_no_definition_has_no_version(library):
    """It stood for the whole module, so that a misspelt name looked at too much, or at nothing of its own."""
    known = [digest.version.__wrapped__(name) for name in ("wdat.room.low", "wdat.room.low.Ball.cost", "wdat.main.run")]
    assert len(set(known)) == 3
    with pytest.raises(ValueError, match=r"wdat\.room\.low\.bal leads to no definition of wdat\.room\.low; name"):
        digest.version.__wrapped__("wdat.room.low.bal")


@pytest.mark.parametrize("what", OTHER)
def test_what_may_alter_a_number_alters_the_digest_of_all_that_reach_it(library, what):
    file, old, new, reaching, others = OTHER[what]
    before = digests_of(f"{reaching}, {others}")
    library(file, old, new)
    after = digests_of(f"{reaching}, {others}")
    assert {name for name in after if after[name] != before[name]} == set(reaching.split(", "))


def test_a_moved_file_alters_nothing_and_what_it_does_when_imported_is_not_forgotten(library, tmp_path):
    def digests() -> list[str]:
        place = "low" if (tmp_path / "wdat/low.py").exists() else "room.low"
        return [digest.reached(f"from wdat.{place} import {name}\n{name}(1)")[0] for name in ("scaled", "Ball", "even")]

    before, acting = digests(), digest.reached("from wdat.acting import act\nact()")[0]
    (tmp_path / "wdat/room/low.py").rename(tmp_path / "wdat/low.py")
    library("room/__init__", "wdat.room.low", "wdat.low")
    library("main", "from wdat.room import low", "from wdat import low")
    library("main", "wdat.room.low", "wdat.low")
    assert digests() == before
    library("effect", "math.pi", "math.e")
    assert digest.reached("from wdat.acting import act\nact()")[0] != acting and digests() == before


def test_a_module_or_the_front_door_named_as_a_whole_reaches_all_below(library):
    wholes = {
        "wdat": "import wdat\nwdat.run",
        "room": "import wdat.room as r\nr",
        "main": "from wdat import main\nmain",
    }
    before = {name: digest.reached(code)[0] for name, code in wholes.items()}
    library("room/low", "LOW, HIGH = 1, 2", "LOW, HIGH = 1, 3")
    after = {name: digest.reached(code)[0] for name, code in wholes.items()}
    assert all(after[name] != before[name] for name in wholes)
    library("acting", "return 0", "return 1")
    assert [name for name, code in wholes.items() if digest.reached(code)[0] != after[name]] == ["wdat"]


def test_what_is_reached_is_told_by_name_and_what_lies_apart_is_left_out(library):
    code = "%matplotlib inline\nfrom wdat.main import ball\nball(3)"
    whole, found = digest.reached(code)
    names = {"_norm", "scaled", "RATE", "Ball", "LOW", "HIGH"}  # a class with all its methods
    assert set(found) == {"", "wdat.main.ball"} | {f"wdat.room.low.{name}" for name in names}
    without, _ = digest.reached(code, "wdat.room")
    library("room/low", "RATE = 0.5", "RATE = 0.25")
    changed, again = digest.reached(code)
    assert changed != whole and {name for name in found if found[name] != again[name]} == {"wdat.room.low.RATE"}
    assert digest.reached(code, "wdat.room")[0] == without != whole


def test_files_that_come_and_go_while_they_are_listed(tmp_path, monkeypatch):
    for name in ("there", ".begun.host.1.part"):
        (tmp_path / name).write_text("1")
    assert list(staleness.stamps([tmp_path])) == [tmp_path / "there"]
    monkeypatch.setattr("os.walk", lambda folder: iter([(folder, [], ["there", "gone"])]))
    assert list(staleness.stamps([tmp_path])) == [tmp_path / "there"]
