"""Settings as people write them: each kind takes what means it, and refuses the rest with place, value and remedy."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from wdat.reproduce import runner
from wdat.settings import Order, Written, arguments, read, reads, typed


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
    assert runner.kind(default) == kind
