"""Settings as people write them: each kind takes what means it, and refuses the rest with place, value and remedy."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import yaml

import wdat
from wdat import cli
from wdat.reproduce import profiles
from wdat.settings import Order, Written, arguments, read, reads, typed
from wdat.studies.study import Sweep
from wdat.training.recipes import Recipe, make_recipe
from wdat.training.trackers import Rule


@pytest.mark.parametrize(
    ("kind", "value", "meant"),
    [
        (bool, True, True), (bool, "false", False), (bool, "True", True), (bool, np.True_, True),
        (int, 16, 16), (int, "16", 16), (int, 64.0, 64), (int, "64.0", 64), (int, "1e3", 1000), (int, np.int64(3), 3),
        (int, 2**60 + 1, 2**60 + 1), (int, torch.tensor(5), 5),
        (float, 1, 1.0), (float, "1e-3", 1e-3), (float, "8/255", 8 / 255), (float, 0.5, 0.5), (float, "2/16", 0.125),
        (Order, "inf", math.inf), (Order, math.inf, math.inf), (Order, 2, 2.0),
        (Written, "8/255", "8/255"), (Written, 0.25, 0.25), (Written, "inf", "inf"),
        (str, "16", "16"), (int | None, None, None), (int | None, "7", 7), (float | str, "random", "random"),
        (float | str, "1e-3", 1e-3), (list[float], [1, "1/2"], [1.0, 0.5]), (tuple[str, ...], ["a"], ("a",)),
        (dict, {"a": 1}, {"a": 1}), (Callable[[int], int], abs, abs),
    ],
)  # fmt: skip
def test_what_is_meant_is_read(kind, value, meant):
    found = read(kind, value, "recipe: it")
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (bool, "yes", "true or false"), (bool, 1, "true or false"), (bool, 0.0, "true or false"),
        (bool, None, "true or false"),
        (int, 1.5, "a whole number"), (int, "1.9", "a whole number"), (int, True, "a whole number"),
        (int, "2/16", "a whole number"), (int, "many", "a whole number"), (int, [1], "a whole number"),
        (int, None, "a whole number"), (int, math.inf, "a whole number"), (int, "1e400", "a whole number"),
        (float, True, "a number"), (float, "tiny", "a number"), (float, math.nan, "a number"),
        (float, "nan", "a number"),
        (float, math.inf, "a number"), (float, "1e999999999", "a number"), (float, "1/0", "a number"),
        (float, {}, "a number"), (Order, "8/", 'a number or "inf"'), (Written, True, "a number"),
        (Written, "wide", "a number"), (str, 7, "text"), (int | None, "1.5", "a whole number.* or nothing"),
        (list[float], 0.5, "a list, each a number"), (list[float], ["x"], "a list, each a number"),
        (list[str], "abc", "a list, each text"), (dict, [], "a mapping"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_place_value_and_kind(kind, value, expected):
    with pytest.raises(ValueError, match=f"recipe: it is .*; expected {expected}") as error:
        read(kind, value, "recipe: it")
    assert repr(value) in str(error.value)


@dataclass(frozen=True)
class Inner:
    """Settings inside settings."""

    width: int = 3
    budget_loss: str = "ce"

    def __post_init__(self) -> None:
        typed(self, "inner")


@dataclass(frozen=True)
class Outer:
    """Settings with a part of their own."""

    inner: Inner = field(default_factory=Inner)
    flip: bool = False


def test_parts_are_read_from_mappings():
    assert arguments(Outer, {"inner": {"width": "5"}, "flip": "false"}, "outer") == {"inner": Inner(5), "flip": False}
    assert Inner("5") == Inner(5.0) == Inner(5)
    for settings, sentence in [
        ({"inner": {"width": 1.5}}, "outer: inner: width is 1.5; expected a whole number"),
        ({"inner": "wide"}, "outer: inner is 'wide'; expected a mapping of width, budget_loss"),
        ({"inner": {"loss": "ce"}}, "'loss' of outer: inner; did you mean budget_loss?"),
        ({"flop": True}, "'flop' of outer; did you mean flip?"),
        ({True: 1}, "True of outer"),
        (["flip"], "outer is .'flip'.; expected a mapping of inner, flip"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            arguments(Outer, settings, "outer")


def test_a_function_takes_the_settings_of_a_part():
    @reads("make", Inner, "width")
    def keyword(a: int, b: float = 1.0, **settings) -> tuple:
        return a, b, settings

    assert keyword("2", b="1/2", budget_loss="kl") == (2, 0.5, {"budget_loss": "kl"})
    assert keyword(2) == (2, 1.0, {})
    with pytest.raises(ValueError, match="'width' of make; known: a, b, budget_loss"):
        keyword(2, width=3)
    with pytest.raises(TypeError, match="missing a required argument: 'a'"):
        keyword()


@pytest.mark.parametrize(
    ("default", "kind"),
    [
        (True, bool), (1, int), (0.5, float), ("inf", Written), ("8/255", Written), ("digits", str), ("", str),
        ({}, dict), ([1, 2], list[int]), ([1.5, 2, "inf"], list[Written]), (["1/16"], list[Written]),
        (["ce", "dlr"], list[str]),
    ],
)  # fmt: skip
def test_a_parameter_is_of_the_kind_of_its_default(default, kind):
    assert profiles.kind(default) == kind


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 1.5}, "sweep: steps is 1.5; expected a whole number"),
        ({"autoattack_all": "yes"}, "sweep: autoattack_all is 'yes'; expected true or false"),
        ({"shares": 0.5}, "sweep: shares is 0.5; expected a list, each a number"),
        ({"search": {"rivals": "few"}}, "the search: rivals is 'few'; expected a whole number"),
        ({"attacked": ["1/8"]}, "unknown setting '1/8' of attacked; known: 1/16"),
    ],
)
def test_a_sweep_is_read_as_recipes_are(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sweep({}, [], [0], [wdat.Threat("1/16")], **settings)


def test_a_sweep_from_text():
    found = Sweep({}, [], ["1"], [wdat.Threat("1/16")], validation="1/10", shares=["1/2"], search={"steps": "4"})
    assert (found.seeds, found.validation, found.shares, found.search) == ([1], 0.1, [0.5], {"steps": 4})


# Recipes, objectives and rules, from Python and from YAML

WRONG = [
    ({"flip": "yes"}, "recipe: flip is 'yes'; expected true or false"),
    ({"epochs": 1.5}, "recipe: epochs is 1.5; expected a whole number"),
    ({"epochs": "1.9"}, "recipe: epochs is '1.9'; expected a whole number"),
    ({"epochs": True}, "recipe: epochs is True; expected a whole number"),
    ({"batch_size": "2/16"}, "recipe: batch_size is '2/16'; expected a whole number"),
    ({"lr": "fast"}, "recipe: lr is 'fast'; expected a number"),
    ({"lr": False}, "recipe: lr is False; expected a number"),
    ({"clip": math.inf}, "recipe: clip is inf; expected a number"),
    ({"schedule": 3}, "recipe: schedule is 3; expected text"),
    ({"upsilon": {"every": 2.5}}, "recipe: upsilon: every is 2.5; expected a whole number"),
    ({"upsilon": {"rate": 2}}, "'rate' of recipe: upsilon; known: kind, every, subset, weight"),
    ({"upsilon": "full"}, "recipe: upsilon is 'full'; expected a mapping of kind, every"),
    ({"objective": {"kind": "w-trades", "delta": "wide"}}, "threat: delta is 'wide'; expected a number"),
    ({"objective": {"kind": "w-trades", "delta": True}}, "threat: delta is True; expected a number"),
    ({"objective": {"kind": "trades", "delta": True}}, "objective trades: delta is True; expected a number"),
    ({"objective": {"kind": "at", "delta": 0.1, "steps": 1.5}}, "objective at: steps is 1.5; expected a whole number"),
    ({"objective": {"kind": "mart", "delta": 0.1, "beta": "x"}}, "objective mart: beta is 'x'; expected a number"),
    ({"objective": {"kind": "w-trades", "delta": 0.1, "loss": "ce"}}, "'loss' of objective w-trades; .* budget_loss"),
    ({"objective": {"kind": "water-level", "delta": 1, "rivls": 2}}, "'rivls' of objective water-level; .* rivals?"),
    ({"objective": {"kind": "plain", "delta": 0.1}}, "'delta' of objective plain; known: distil"),
    ({"objective": {"kind": "trades"}}, "'trades': missing a required argument: 'delta'"),
    ({"objective": {"kind": "plain", "distil": "a lot"}}, "distil is 'a lot'; expected a number"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "sentence"), WRONG, ids=lambda value: str(value)[:60])
def test_a_recipe_is_refused_with_section_setting_value_and_kind(settings, sentence):
    for make in (lambda s: make_recipe(s, 0), lambda s: Recipe(**s)):
        with pytest.raises(ValueError, match=sentence):
            make({"objective": {"kind": "plain"}, **settings})


def test_unknown_settings_of_a_recipe_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"'epoch' of recipe; did you mean epochs\?"):
        make_recipe({"objective": {"kind": "plain"}, "epoch": 3}, 0)
    with pytest.raises(ValueError, match=r"'loss' of objective w-trades; did you mean budget_loss\?"):
        wdat.w_trades(wdat.Threat("8/255"), loss="ce")


def test_a_recipe_says_what_its_text_means():
    text = """
    objective: {kind: trades, delta: 2/16, beta: 1e0, steps: "3", start: 1e-3, r: l2}
    epochs: "16"
    batch_size: 64.0
    lr: 1e-3
    weight_decay: 5e-4
    flip: "false"
    upsilon: {kind: full, every: "10"}
    """
    found = make_recipe(yaml.safe_load(text), 7)
    assert found == Recipe(
        wdat.trades("2/16", 2, 1.0, steps=3, start=1e-3),
        16,
        64,
        lr=1e-3,
        weight_decay=5e-4,
        upsilon=Rule(every=10),
        seed=7,
    )
    assert (found.flip, found.epochs, found.batch_size) == (False, 16, 64) and type(found.batch_size) is int
    assert found.objective.terms[0].threat.written == "2/16"
    assert make_recipe({"objective": {"kind": "plain"}, "flip": "true"}, 0).flip is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "net.yaml", "--steps", "1.5"], "--steps: the value is '1.5'; expected a whole number"),
        (["evaluate", "net.yaml", "--n", "true"], "--n: the value is 'true'; expected a whole number"),
        (["finetune", "a", "b", "c", "--validation", "half"], "--validation: the value is 'half'; expected a number"),
        (["reproduce", "--jobs", "2/16"], "--jobs: the value is '2/16'; expected a whole number"),
        (["reproduce", "-P", "n"], "'n' is not of the form name=value"),
    ],
)
def test_the_shell_names_the_option(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_the_shell_reads_numbers_as_settings():
    read_ = cli.parser().parse_args(["finetune", "a", "b", "c", "--validation", "1/20", "--seed", "3.0", "--n", "1e3"])
    assert (read_.validation, read_.seed, read_.n) == (0.05, 3, 1000)
