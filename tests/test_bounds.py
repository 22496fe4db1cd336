"""First-order bounds: their formulas, what they mean in exact cases, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import images, labels, linear, quick

from wdat.accuracy.bounds import out_of_sample, ratio_bounds
from wdat.attacks.pgd import attack
from wdat.threats.ball import Threat
from wdat.threats.losses import redlr
from wdat.threats.sensitivity import upsilon

fractions = st.floats(0.01, 1)


@given(a=fractions, share=st.floats(0, 1), v0=st.floats(-1, 0.5), gap=st.floats(0.01, 2), gain=st.floats(0, 1),
       slope=st.floats(0, 50), delta=st.floats(0, 0.1))  # fmt: skip
@quick
def test_formulas(a, share, v0, gap, gain, slope, delta):
    w0, v = v0 + gap, v0 + gain
    found = ratio_bounds(a, a * share, v0, w0, v, slope, delta)
    assert found.r_u == pytest.approx(share)
    assert found.r_tilde_l == pytest.approx((w0 - v) / (w0 - v0))
    assert found.r_bar_l == pytest.approx((w0 - v0 - delta * slope) / (w0 - v0), abs=1e-9)
    assert found.r_l == min(found.r_tilde_l, found.r_bar_l)
    assert ratio_bounds(a, a, v0, w0, v0, slope, 0.0) == type(found)(1.0, 1.0, 1.0)  # delta = 0


@given(c=st.floats(0.01, 100), shift=st.floats(-5, 5))
@quick
def test_bounds_do_not_depend_on_the_scale_of_the_loss(c, shift):
    one = ratio_bounds(0.7, 0.4, -0.5, 0.1, -0.2, 3.0, 0.05)
    other = ratio_bounds(0.7, 0.4, c * -0.5 + shift, c * 0.1 + shift, c * -0.2 + shift, c * 3.0, 0.05)
    assert other.r_l == pytest.approx(one.r_l) and other.r_tilde_l == pytest.approx(one.r_tilde_l)


def test_first_order_bounds_agree_where_the_loss_is_linear():
    """If the attack gains exactly delta * upsilon the two lower bounds are one."""
    v0, slope, delta = -0.6, 2.0, 0.03
    found = ratio_bounds(0.8, 0.7, v0, 0.0, v0 + delta * slope, slope, delta)
    assert found.r_tilde_l == pytest.approx(found.r_bar_l)


def test_lower_bounds_lie_below_the_attack_for_small_delta():
    model = linear(4)
    x = images(64, low=0.3, high=0.7)
    y = labels(model, x)
    threat = Threat(0.002, 2)
    found = attack(model, x, y, threat)
    with torch.no_grad():
        values, wrong = redlr(model(x), y), model(x).argmax(1) != y
    slope = upsilon(model, x, y, threat).value
    clean = 1 - float(wrong.double().mean())
    bounds = ratio_bounds(
        clean, found.accuracy, float(values.mean()), float(values[wrong].mean()), found.loss, slope, 0.002
    )
    assert 0 < bounds.r_l <= bounds.r_u + 1e-6 <= 1 + 1e-6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0.0, 0.0, -1, 0, -0.5, 1, 0.1), "clean accuracy is 0"),
        ((0.5, 0.2, 0.3, 0.3, 0.4, 1, 0.1), r"W\(0\)=0.3 <= V\(0\)=0.3"),
        ((0.5, 0.2, math.nan, 0.3, 0.4, 1, 0.1), "finite"),
        ((0.5, 0.2, 0.1, 0.3, math.inf, 1, 0.1), "finite"),
    ],
)
def test_meaningless_bounds_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ratio_bounds(*arguments)


def test_out_of_sample_term():
    bound, probability = out_of_sample(0.4, 0.1, 3.0, 1000, 1, 0.5)
    assert bound == pytest.approx(0.4 + 0.1 * 3.0)
    assert probability == pytest.approx(1 - 0.5 * math.exp(-0.5 * 1000 * 0.1))
    assert out_of_sample(0.4, 0.1, 3.0, 10**6, 3072, 2.0)[1] == 0  # the dimension of images makes it vacuous
    chances = [out_of_sample(0.4, 0.3, 3.0, n, 2, 1.0)[1] for n in (1, 10, 100, 1000)]
    assert chances == sorted(chances) and chances[-1] > 0.999
    for wrong in ((0.4, 0.1, 3.0, 0, 1, 1.0), (0.4, -0.1, 3.0, 1, 1, 1.0), (0.4, 0.1, 3.0, 1, 0, 1.0)):
        with pytest.raises(ValueError, match="need n, dimension >= 1"):
            out_of_sample(*wrong)
