"""Input gradients and upsilon: full pass, subset, moving average; the slope of V; independence of batches."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import NORMS, ORDERS, batch_norm, counting, generator, images, labels, linear, norms_of, quick, relu, smooth
from torch import nn

from wdat.threats.ball import Threat, per_image
from wdat.threats.checks import frozen
from wdat.threats.losses import ce, redlr
from wdat.threats.sensitivity import MovingAverage, dual_norms, feasible, input_gradient, upsilon, upsilon_of_norms

INF = math.inf
random_case = given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 12),
    p=st.one_of(st.sampled_from(ORDERS), st.floats(1.1, 20)),
    r=st.sampled_from(NORMS),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
)


# Input gradients


@random_case
@quick
def test_input_gradient_of_a_linear_model_in_closed_form(seed, n, p, r, shape):
    """grad_x CE = W^T (softmax(z) - e_y), image by image."""
    model, x = linear(5, shape, seed), images(n, shape, seed)
    y = torch.randint(0, 5, (n,), generator=generator(seed))
    gradient, values, logits = input_gradient(model, x, y, ce)
    z = model(x).detach()
    weight = model[1].weight.detach()
    expected = (z.softmax(1) - torch.nn.functional.one_hot(y, 5)) @ weight
    torch.testing.assert_close(gradient.flatten(1), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values, ce(z, y))
    torch.testing.assert_close(logits, z)
    assert not any(t.requires_grad for t in (gradient, values, logits, x))
    found = dual_norms(model, x, y, Threat(0.1, p, r), "ce")
    torch.testing.assert_close(found, expected.norm(1 if math.isinf(r) else 2, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [smooth, relu, batch_norm])
def test_gradients_do_not_depend_on_the_batch(make):
    """In eval mode; the classic bugs are the mean of the losses and batch norm in train mode."""
    model, x = make(), images(11)
    y = labels(model, x)
    model.train()
    threat = Threat(0.1, 2)
    whole = dual_norms(model, x, y, threat, "ce", batch_size=11)
    for size in (1, 2, 5, 100):
        torch.testing.assert_close(dual_norms(model, x, y, threat, "ce", batch_size=size), whole, rtol=1e-5, atol=1e-8)
    order = torch.randperm(11, generator=generator(0))
    torch.testing.assert_close(dual_norms(model, x[order], y[order], threat, "ce"), whole[order], rtol=1e-5, atol=1e-8)
    assert all(m.training for m in model.modules())


def test_gradient_is_that_of_the_sum_not_of_the_mean():
    model, x = smooth(), images(8)
    y = labels(model, x)
    one = torch.cat([input_gradient(model, x[i : i + 1], y[i : i + 1], ce)[0] for i in range(8)])
    torch.testing.assert_close(input_gradient(model, x, y, ce)[0], one)
    with torch.no_grad():  # also where the caller has switched gradients off
        torch.testing.assert_close(input_gradient(model, x, y, ce)[0], one)


def test_one_forward_and_one_backward_per_image():
    model, x = relu(), images(10)
    y = labels(model, x)
    with counting(model) as passes:
        upsilon(model, x, y, Threat(0.1, 2), batch_size=4)
    assert passes == {"grad": 10, "no_grad": 0, "backward": 10}
    with counting(model) as passes:
        upsilon(model, x, y, Threat(0.1, 2), subset=3)
    assert passes == {"grad": 3, "no_grad": 0, "backward": 3}


class Detached(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        self.how, self.network = how, linear(4)

    def forward(self, x):
        return self.how(self.network)(x)


@pytest.mark.parametrize("how", [torch.no_grad(), lambda f: lambda x: f(x.detach()), lambda f: lambda x: 2 * f(x).data])
def test_a_model_without_gradients_is_refused(how):
    with pytest.raises(ValueError, match="no gradient in the images"):
        dual_norms(Detached(how), images(3), torch.zeros(3, dtype=torch.int64), Threat(0.1))


def test_gradients_that_point_out_of_the_box_are_not_feasible():
    x = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5, 0.5]).view(1, 1, 1, 6)
    g = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]).view(1, 1, 1, 6)
    assert feasible(g, x).flatten().tolist() == [0, 1, -1, 0, -1, 1]
    model, y = linear(4, (1, 1, 6)), torch.tensor([1])
    norms = [float(dual_norms(model, x, y, Threat(0.1), "ce", box=box)) for box in (False, True)]
    gradient = input_gradient(model, x, y, ce)[0]
    assert norms == pytest.approx([float(gradient.abs().sum()), float(feasible(gradient, x).abs().sum())])
    assert norms[1] < norms[0]


# Upsilon


@random_case
@quick
def test_upsilon_is_the_slope_of_v(seed, n, p, r, shape):
    """Central difference of the mean loss along the first-order optimal displacement, in float64."""
    model, x = smooth(4, shape, seed).double(), images(n, shape, seed).double()
    y = labels(model, x)
    threat, t = Threat(1.0, p, r), 1e-6
    with frozen(model):
        gradient, _, _ = input_gradient(model, x, y, ce)
        dual = threat.dual_norm(gradient)
        step = t * per_image(threat.budgets(dual), x) * threat.direction(gradient)
        slope = (ce(model(x + step), y).mean() - ce(model(x - step), y).mean()) / (2 * t)
    assert float(slope) == pytest.approx(float(threat.upsilon(dual)), rel=1e-6)


def test_upsilon_is_non_increasing_in_p_and_homogeneous_in_the_loss():
    model, x = smooth(), images(20)
    y = labels(model, x)
    for r in NORMS:
        values = [upsilon(model, x, y, Threat(0.1, p, r), "ce").value for p in ORDERS]
        assert all(a >= b for a, b in itertools.pairwise(values)) and values[0] > values[-1] > 0
        for c in (1e-3, 50.0):
            scaled = upsilon(model, x, y, Threat(0.1, 2, r), lambda z, t, c=c: c * ce(z, t)).value
            assert scaled == pytest.approx(c * upsilon(model, x, y, Threat(0.1, 2, r), "ce").value, rel=1e-5)
    assert upsilon(model, x, y, Threat(0.1)).value == upsilon(model, x, y, Threat(99.0)).value  # delta plays no part


def test_duplicating_the_images_leaves_upsilon_unchanged():
    model, x = smooth(), images(9)
    y = labels(model, x)
    found = [upsilon(model, a, b, Threat(0.1)).value for a, b in ((x, y), (x.repeat(3, 1, 1, 1), y.repeat(3)))]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_misclassified_images_add_nothing_to_upsilon_of_redlr():
    model, x = smooth(), images(30)
    y = labels(model, x, wrong=3)
    norms = dual_norms(model, x, y, Threat(0.1))
    with torch.no_grad():
        assert torch.equal(norms == 0, redlr(model(x), y) == 0)
    correct = norms > 0
    part = upsilon(model, x[correct], y[correct], Threat(0.1, 2)).value
    assert upsilon(model, x, y, Threat(0.1, 2)).value == pytest.approx(part * float(correct.double().mean()) ** 0.5)


def test_two_halves_joined_are_the_whole():
    """What processes exchange are dual norms (or sums of their q-th powers): the number of them plays no part."""
    model, x = smooth(), images(17)
    y = labels(model, x)
    for p in ORDERS:
        threat = Threat(0.1, p)
        halves = torch.cat([dual_norms(model, x[:9], y[:9], threat), dual_norms(model, x[9:], y[9:], threat)])
        assert upsilon_of_norms(halves, threat.q).value == pytest.approx(upsilon(model, x, y, threat).value, rel=1e-6)


# Subsets


@given(seed=st.integers(0, 10**6), total=st.integers(3, 8), share=st.floats(0.1, 1), p=st.sampled_from(ORDERS))
@quick
def test_a_subset_is_unbiased_for_the_qth_power_and_its_error_is_the_true_one(seed, total, share, p):
    """Over all subsets of a small set, exactly: the mean of upsilon^q, and of the squared standard error."""
    q, n = Threat(0.1, p).q, min(max(2, round(share * total)), total - 1)
    norms = norms_of(seed, total).clamp_max(5) + 0.01
    found = [upsilon_of_norms(norms[list(chosen)], q, total) for chosen in itertools.combinations(range(total), n)]
    powers = torch.tensor([f.value**q for f in found], dtype=torch.float64)
    truth = float(norms.pow(q).mean())
    assert float(powers.mean()) == pytest.approx(truth, rel=1e-9)
    errors = torch.tensor([q * f.value ** (q - 1) * f.error for f in found], dtype=torch.float64)  # of upsilon^q
    assert float(errors.square().mean()) == pytest.approx(float((powers - truth).square().mean()), rel=1e-6)


@pytest.mark.parametrize("p", [1.5, 2.0, INF])
def test_the_standard_error_of_a_subset_covers(p):
    """1,000 subsets: the 95 % interval holds the truth in 95 % of them, give or take the tails of the norms."""
    q = Threat(0.1, p).q
    norms = torch.rand(400, generator=generator(0), dtype=torch.float64) + 0.2
    truth, g = upsilon_of_norms(norms, q).value, generator(1)
    found = [upsilon_of_norms(norms[torch.randperm(400, generator=g)[:100]], q, 400) for _ in range(1000)]
    covered = sum(abs(f.value - truth) <= 1.96 * f.error for f in found) / 1000
    assert 0.925 <= covered <= 0.975  # 3.6 standard errors of the count
    spread = torch.tensor([f.value for f in found]).std()
    assert float(spread) == pytest.approx(sum(f.error for f in found) / 1000, rel=0.1)


def test_subsets_are_fixed_by_their_seed():
    model, x = smooth(), images(40)
    y = labels(model, x)
    before = torch.get_rng_state()
    a, b, c = (upsilon(model, x, y, Threat(0.1), subset=10, seed=s) for s in (0, 0, 1))
    assert a == b != c and (a.n, a.total) == (10, 40) and a.error > 0
    full = upsilon(model, x, y, Threat(0.1))
    assert full == upsilon(model, x, y, Threat(0.1), subset=40) and (full.error, full.n, full.total) == (0, 40, 40)
    assert upsilon(model, x, y, Threat(0.1), subset=1).error == INF
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="subset=0"):
        upsilon(model, x, y, Threat(0.1), subset=0)


# Moving averages


@given(seed=st.integers(0, 10**6), p=st.sampled_from(ORDERS), weight=st.floats(0.01, 1))
@quick
def test_moving_average_of_qth_powers(seed, p, weight):
    """The closed form of the normalised exponential average; weight 1 on the full set is the full pass."""
    q = Threat(0.1, p).q
    batches = [norms_of(seed + i, 6) for i in range(5)]
    average = MovingAverage(q, weight)
    assert average.value == 0
    for i, batch in enumerate(batches):
        value = average.update(batch)
        weights = [(1 - weight) ** (i - j) for j in range(i + 1)]
        powers = [float(b.pow(q).mean()) for b in batches[: i + 1]]
        expected = sum(w * v for w, v in zip(weights, powers, strict=True)) / sum(weights)
        assert value == average.value == pytest.approx(expected ** (1 / q), rel=1e-9)
    full = torch.cat(batches)
    assert MovingAverage(q, 1.0).update(full) == pytest.approx(upsilon_of_norms(full, q).value, rel=1e-12)
    again = MovingAverage(q, weight, average.total, average.mass)  # the state is two numbers
    assert again.update(full) == average.update(full)


def test_averaging_upsilon_itself_would_be_biased():
    """Jensen: the mean of the batches' upsilons lies below the upsilon of their union, that of the powers does not."""
    q, norms = 2.0, norms_of(3, 64)
    batches = norms.split(4)
    plain = sum(float(Threat(1, 2).upsilon(b)) for b in batches) / 16
    powers = (sum(float(Threat(1, 2).upsilon(b)) ** q for b in batches) / 16) ** (1 / q)
    assert powers == pytest.approx(upsilon_of_norms(norms, q).value) and plain < 0.9 * powers


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.1])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(ValueError, match="must be in"):
        MovingAverage(2.0, weight)


# What is left behind, and bad input


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_changed(fails):
    model, x = batch_norm(), images(6)
    y = labels(model, x)
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    before, pixels = torch.get_rng_state(), x.clone()

    def loss(z, t):
        if fails:
            raise RuntimeError("in the loss")
        return ce(z, t)

    if fails:
        with pytest.raises(RuntimeError, match="in the loss"):
            upsilon(model, x, y, Threat(0.1), loss)
    else:
        upsilon(model, x, y, Threat(0.1), loss)
    assert modes == [m.training for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters()) and x.grad is None and not x.requires_grad
    assert all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(x, pixels)


class Broken(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.network = value, linear(4)

    def forward(self, x):
        return self.network(x) * self.value


@pytest.mark.parametrize(
    ("model", "x", "y", "sentence"),
    [
        (linear(4), images(4) * 255, torch.arange(4), "divide by 255"),
        (linear(4), images(4), torch.arange(5), "5 labels for 4 images"),
        (linear(4), images(4), torch.arange(4) + 1, r"4 classes are 0..3"),
        (linear(4), images(4)[:0], torch.arange(0), "non-empty"),
        (nn.Sequential(linear(4), nn.Softmax(1)), images(4), torch.arange(4), "probabilities"),
        (Broken(math.nan), images(4), torch.arange(4), "logits of 4 of 4 images are NaN"),
    ],
)
def test_bad_input_gets_its_sentence(model, x, y, sentence):
    with pytest.raises(ValueError, match=sentence):
        upsilon(model, x, y, Threat(0.1))


def test_gradients_that_are_not_finite_are_refused():
    model, x = linear(4), images(4)
    with pytest.raises(ValueError, match="gradients of 4 of 4 images are NaN"):
        dual_norms(model, x, torch.arange(4), Threat(0.1), lambda z, t: (z - z.detach()).pow(0.5).sum(1) * math.nan)
