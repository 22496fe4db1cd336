"""Learning-rate schedules as functions: closed forms, and slow start, fast decay as published."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import quick

from wdat.training.schedules import (
    SCHEDULES,
    constant,
    cosine,
    fast_start_slow_decay,
    geometric_start_fast_decay,
    get_schedule,
    slow_start_fast_decay,
    step,
)


def rates(schedule, epochs: int, base: float = 1.0) -> list[float]:
    return [schedule(float(e), epochs, base) for e in range(epochs)]


def test_slow_start_fast_decay_of_ten_epochs():
    assert rates(slow_start_fast_decay, 10) == [1, 2, 3, 4, 5, 2.5, 1.25, 0.625, 0.3125, 0.15625]
    assert sum(rates(slow_start_fast_decay, 10, 0.002)) == pytest.approx(19.84375 * 0.002, rel=1e-12)


@given(epochs=st.integers(2, 60), base=st.floats(1e-4, 1), part=st.floats(0, 0.999))
@quick
def test_slow_start_fast_decay(epochs, base, part):
    lr, half = rates(slow_start_fast_decay, epochs, base), epochs // 2
    assert all(a < b for a, b in pairwise(lr[:half]))
    assert all(a > b for a, b in pairwise(lr[half - 1 :]))
    assert max(lr) == lr[half - 1] == pytest.approx(half * base)
    assert lr[half] == pytest.approx(max(lr) / 2)
    for e in range(epochs):  # constant within an epoch
        assert slow_start_fast_decay(e + part, epochs, base) == lr[e]


@given(epochs=st.integers(2, 60), base=st.floats(1e-4, 1), part=st.floats(0, 0.999))
@quick
def test_variants_of_slow_start_fast_decay(epochs, base, part):
    """A ramp that doubles to the same peak; the same rates in reverse order, so that equal sums are compared."""
    linear, half = rates(slow_start_fast_decay, epochs, base), epochs // 2
    geometric = rates(geometric_start_fast_decay, epochs, base)
    assert geometric[half - 1 :] == linear[half - 1 :]
    assert all(b == pytest.approx(2 * a) for a, b in pairwise(geometric[:half]))
    assert rates(fast_start_slow_decay, epochs, base) == linear[::-1]
    for schedule in (geometric_start_fast_decay, fast_start_slow_decay):
        assert schedule(epochs - 1 + part, epochs, base) == schedule(epochs - 1, epochs, base)


def test_slow_start_fast_decay_of_one_epoch():
    for schedule in (slow_start_fast_decay, geometric_start_fast_decay, fast_start_slow_decay):
        assert rates(schedule, 1, 0.5) == [0.5]


@given(epochs=st.integers(1, 60), base=st.floats(1e-4, 1), at=st.floats(0, 0.999))
@quick
def test_the_others(epochs, base, at):
    progress = at * epochs
    assert constant(progress, epochs, base) == base
    assert step(progress, epochs, base) == pytest.approx(base * (1 if at < 0.5 else 0.1 if at < 0.75 else 0.01))
    assert cosine(0.0, epochs, base) == base
    assert cosine(epochs / 2, epochs, base) == pytest.approx(base / 2)
    assert cosine(progress, epochs, base) + cosine(epochs - progress, epochs, base) == pytest.approx(base)
    assert 0 <= cosine(progress, epochs, base) <= base


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_scale_with_their_base(name):
    for e, rate in enumerate(rates(SCHEDULES[name], 7)):
        assert SCHEDULES[name](float(e), 7, 0.03) == pytest.approx(0.03 * rate)
    assert get_schedule(name) is SCHEDULES[name]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown learning-rate schedule 'linear'; known: constant, step"):
        get_schedule("linear")
