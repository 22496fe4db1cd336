"""The command as scripts and shells meet it: help that teaches, one JSON object, exit codes, completion."""

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser as torchrun

import wdat
from wdat import cli
from wdat.cli import arguments

VERBS = next(iter(cli.parser()._subparsers._group_actions)).choices
RECIPE = "{objective: {kind: plain}, epochs: 1}"


@pytest.fixture
def net(tmp_path, monkeypatch):
    """A working folder with a card of an untrained network."""
    monkeypatch.chdir(tmp_path)
    wdat.save_model(wdat.zoo.networks.build("digits_cnn", width=2), "net.yaml", architecture="digits_cnn",
                    arguments={"width": 2})  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize("name", VERBS)
def test_help_teaches_by_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    said = capsys.readouterr().out
    lines = [line.split("    #")[0].strip() for line in said.split("examples:")[1].splitlines() if line.strip()]
    assert end.value.code == 0 and lines
    for line in lines:
        words = shlex.split(re.sub(r"^.*?(wdat\.cli|wdat) ", "", line.removesuffix(')"')).partition(" > ")[0])
        assert cli.parser().parse_args(words).run is VERBS[words[0]].get_default("run")


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("evaluate net.yaml --data digits --n 12 --steps 2 --delta 1/16", {"clean", "optimal"}),
        ("certify net.yaml --data digits --n 6 --sigma 0.5 --draws 100", {"threats", "accuracy"}),
        ("finetune net.yaml recipe.yaml new.yaml --data digits --n 60", {"card", "last"}),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_json_is_one_object_and_all_of_stdout(words, keys, net):
    ran = subprocess.run([sys.executable, "-m", "wdat.cli", *words.split(), "--json"], capture_output=True, text=True)
    found = json.loads(ran.stdout)
    assert ran.returncode == found["code"] == 0 and found["error"] is None and found["verb"] == words.split()[0]
    assert keys <= set(found) and "device: " in ran.stderr
    assert json.loads((net / found["record"]).read_text())["kind"]


def test_json_says_errors_too(net, capsys):
    assert cli.main(["evaluate", "absent.yaml", "--data", "digits", "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out) | {"error": ""} == {"verb": "evaluate", "code": 2, "error": ""}
    assert "no model card" in json.loads(said.out)["error"] and said.err.splitlines()[-1].startswith("wdat: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (arguments.Found("two links", {"broken": ["a", "b"]}), 1),
        (ValueError("p=0"), 2),
        (FileNotFoundError("no card"), 2),
        (OSError(28, "No space left on device"), 3),
        (torch.OutOfMemoryError("2 GiB"), 3),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("a fault"), 70),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes_mean_something(error, code, monkeypatch, capsys):
    def run(args):
        if error is not None:
            raise error
        return {"broken": []}

    def add(sub):
        arguments.verb(sub, "check", run, "short", "long", "wdat check")

    monkeypatch.setattr(cli, "VERBS", [types.SimpleNamespace(add=add)])
    monkeypatch.setattr(sys, "argv", ["wdat", "check", "--json"])
    assert cli.command() == code
    said = capsys.readouterr()
    if code == 70:
        assert "ZeroDivisionError: a fault" in said.err and "please report" in said.err
    else:
        found = json.loads(said.out)
        assert found["code"] == code and found.get("broken") == {0: [], 1: ["a", "b"]}.get(code)
        assert "Traceback" not in said.err


def test_misuse_is_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate"])
    assert end.value.code == 2 and "required" in capsys.readouterr().err


def test_completion_knows_verbs_and_options_or_says_what_to_install(monkeypatch, capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in VERBS) and "--certified-minutes" in said
    ask = f'{said}\nCOMP_WORDS=(wdat ev); COMP_CWORD=1; _shtab_wdat; echo "${{COMPREPLY[@]}}"'
    assert subprocess.run(["bash", "-c", ask], capture_output=True, text=True).stdout.split() == ["evaluate"]


def test_completion_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 3 and "pip install 'wdat[completion]'" in capsys.readouterr().err


def test_both_ways_lead_to_every_verb(tmp_path, monkeypatch, capsys):
    """package.module:function and a weight file: evaluated, fine-tuned, read back and gone on with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "places").mkdir()
    (tmp_path / "places" / "mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom wdat.zoo.networks import Normalised\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    return Normalised([0.5], [0.25], nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))\n"
    )
    (tmp_path / "recipe.yaml").write_text("{objective: {kind: plain}, epochs: 1}")
    torch.save({"model": wdat.load_model("places.mine:make").state_dict()}, "net.pth")
    data = ["--data", "digits", "--n", "40"]
    for model in (["net.pth", "--architecture", "places.mine:make"], ["places.mine:make"]):
        assert cli.main(["finetune", *model[:1], "recipe.yaml", "tuned.yaml", *model[1:], *data]) == 0
        card = wdat.load_model("tuned.yaml").card
        assert card["architecture"] == "places.mine:make" and card["weights"] == "tuned.safetensors"
        assert cli.main(["finetune", "tuned.yaml", "recipe.yaml", "again.yaml", *data]) == 0
        assert cli.main(["evaluate", *model, *data[:-1], "8", "--steps", "1"]) == 0
        before, after = wdat.load_model("tuned.yaml"), wdat.load_model("again.yaml")
        assert type(before) is type(after) is type(wdat.load_model("places.mine:make"))
        x = torch.rand(4, 1, 8, 8)
        assert not torch.equal(before(x), after(x))
        for path in (*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.checkpoint")):
            path.unlink() if path.stem == "again" or len(model) > 1 else None
    assert cli.main(["evaluate", "tuned.yaml", *data[:-1], "8", "--steps", "1"]) == 0
    assert capsys.readouterr().err.count("wdat: ") == 0


def test_every_flag_that_a_message_names_exists():
    """Flags in the library's texts are those of the parser, and so are the verbs before them."""
    top = cli.parser()
    verbs = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction)).choices
    known = {flag for verb in (top, *verbs.values()) for action in verb._actions for flag in action.option_strings}
    known |= {option.replace("_", "-") for a in torchrun()._actions for option in a.option_strings}
    seen = 0
    for path in Path(wdat.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", node.value))
                seen += len(flags)
                assert flags <= known, f"{path.name}: {sorted(flags - known)} in {node.value[:80]!r}"
                for verb in re.findall(r"\bwdat (evaluate|finetune|reproduce|paper|[a-z]+ --)", node.value):
                    assert verb.removesuffix(" --") in verbs, f"{path.name}: wdat {verb}"
    assert seen > 10


def test_a_card_that_notebook_00_makes_is_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"notebook 00 .*: wdat reproduce --profile zoo --only 00"):
        wdat.load_model(tmp_path / ".wdat/zoo/made/zoo/trades.yaml")
