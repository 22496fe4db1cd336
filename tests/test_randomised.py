"""Randomised networks: the certificate against closed forms and brute force, counts, attacks, what is refused."""

import math
from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import batch_norm, generator, images, labels, quick, relu
from scipy.optimize import linprog
from torch import nn

import wdat
from wdat import records
from wdat.accuracy.allocation import accuracy_curve
from wdat.randomised import counts as counting
from wdat.randomised.attack import attack_through, averaged, ladder, upper
from wdat.randomised.certificate import in_sigmas, lower_curve, lower_ends, priced, vote_radii
from wdat.randomised.certify import certify, summary
from wdat.randomised.counts import Counts, count
from wdat.randomised.means import LEVELS, SLOPES, adaptive, bracketed, mean_bound, psi_and_excess
from wdat.training.recipes import Recipe, make_recipe
from wdat.zoo.data import from_tensors
from wdat.zoo.networks import build
from wdat.zoo.noise import Randomised, noise, snap, step_of

Phi, double = torch.special.ndtr, torch.float64
orders = st.sampled_from((1.0, 1.05, 1.5, 2.0, 3.0, 8.0, math.inf))


def two_classes(seed: int = 0) -> nn.Module:
    """A linear network of two classes on images (2, 3, 3)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 18, generator=generator(seed)))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)  # the grey image is on the boundary
    return model.eval()


def margins(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed l2 distances to the boundary of a linear network of two classes."""
    w = (model[1].weight[0] - model[1].weight[1]).double()
    values = (x.flatten(1).double() @ w + (model[1].bias[0] - model[1].bias[1])) / w.norm()
    return torch.where(y == 0, values, -values).detach()


def data_of(model: nn.Module, n: int, wrong: int = 5):
    x = images(n)
    return from_tensors(x, labels(model, x, wrong), classes=[str(k) for k in range(4)])


# The bound


@quick
@given(st.floats(-4, 4), st.floats(1e-4, 1), st.floats(0.01, 5), st.sampled_from((1.0, 1.05, 1.5, 2.0, 3.0, 8.0, 40.0)))
def test_the_inner_minimum_is_bounded_from_below_and_closely(z, weight, d, p):
    found = float(priced(*(torch.tensor(v, dtype=double) for v in (z, weight, d)), p)[0])
    grid = torch.cat([torch.zeros(1), torch.logspace(-8, 1.3, 20001)]).double()
    values = Phi(z - grid) + weight * (grid / d).pow(p)
    at = int(values.argmin())
    low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, len(grid) - 1)])
    with mpmath.workdps(40):
        minimum = min(
            mpmath.ncdf(mpmath.mpf(z) - u) + weight * (u / mpmath.mpf(d)) ** p
            for u in mpmath.linspace(mpmath.mpf(low), mpmath.mpf(high), 301)
        )
        assert minimum - 1e-6 < found <= minimum


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 4.0, math.inf])
def test_the_bound_is_attained_by_a_linear_network(p):
    """g = Phi(margin / sigma), moving along w lowers it as the bound allows, and the best such Q costs delta."""
    model, sigma = two_classes(), 0.3
    x = images(12)
    y = labels(model, x, 4)
    z = margins(model, x, y) / sigma
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    along = torch.where(y == 0, -1.0, 1.0)[:, None] * w / w.norm()
    moved = (x.flatten(1) + 0.2 * along).view_as(x)
    assert torch.allclose(margins(model, moved, y) / sigma, z - 0.2 / sigma, atol=1e-5)
    for delta in (0.05, 0.2, 0.6):
        bound = float(lower_curve(z, [delta], p, sigma=sigma, pixels=18))
        grid = torch.cat([torch.linspace(0, 6, 601), torch.tensor([delta / sigma])]).double()
        value, n = Phi(z[:, None] - grid), len(z)
        if math.isinf(p):
            attained = float(Phi(z - delta / sigma).mean())
        else:  # masses over the grid of moves, a linear programme
            cost = grid.pow(p).repeat(n)[None] / n
            whole = torch.kron(torch.eye(n), torch.ones(1, len(grid)))
            limit = [float((delta / sigma) ** p)]
            given = [a.numpy() for a in (value.flatten() / n, cost, whole)]
            attained = linprog(given[0], given[1], limit, given[2], [1.0] * n, method="highs").fun
        assert bound <= attained + 1e-9
        assert bound > attained - 2e-4  # the moves on a grid cost the adversary a little


@quick
@given(st.integers(0, 99), orders, st.floats(0.01, 2), st.sampled_from((2.0, math.inf)))
def test_never_below_the_averages_bound(seed, p, delta, r):
    sigma, z = 0.5, 2 * torch.randn(20, generator=generator(seed)).double()
    l2 = float(in_sigmas([delta], sigma, r, 18)) * sigma
    averages = float(Phi(z).mean()) - math.erf(l2 / (2 * math.sqrt(2) * sigma))
    assert float(lower_curve(z, [delta], p, sigma=sigma, r=r, pixels=18)) >= averages - 1e-6


def test_monotone_in_radius_order_probability_and_draws():
    z, deltas, at = torch.randn(30, generator=generator(0)).double(), [0, 0.1, 0.3, 0.5, 1], {"sigma": 0.5, "pixels": 9}
    curves = torch.stack([lower_curve(z, deltas, p, **at) for p in (1, 1.2, 2, 5, math.inf)])
    assert float(curves[2, 0]) == pytest.approx(float(Phi(z).mean()))
    assert (curves.diff(dim=1) <= 0).all() and (curves.diff(dim=0) >= -1e-5).all()
    assert (lower_curve(z + 0.1, deltas, 2, **at) > curves[2]).all()
    draws = torch.tensor([100, 1000, 10_000])
    ends = lower_ends((0.8 * draws).long(), draws, 1e-3)
    assert (ends.diff() > 0).all() and (ends < 0.8).all()
    assert float(lower_ends(torch.tensor([0]), torch.tensor([100]), 1e-3)) == 0
    assert float(lower_curve(torch.tensor([-math.inf, math.inf]), [0.1], 2, **at)) > 0.4
    assert (lower_curve(z, deltas, 2, r="inf", **at) <= curves[2]).all()


def test_the_vote_keeps_an_image_up_to_its_radius():
    model, sigma = two_classes(), 0.3
    x = images(12)
    y = labels(model, x, 4)
    distance = margins(model, x, y)
    radii = vote_radii(Phi(distance / sigma), sigma=sigma, pixels=18)
    assert torch.allclose(radii, distance.clamp_min(0), atol=1e-5)  # there g is a half
    assert (vote_radii(torch.tensor([0.2, 0.5, 0.0]), sigma=sigma, pixels=18) == 0).all()
    assert float(accuracy_curve(radii, 0.0, 2)) == pytest.approx(float((distance > 0).double().mean()))


def test_an_attack_on_the_vote_stays_above_its_curve():
    """Pointwise and W_2: the majority of many fresh draws, after an attack through the noise."""
    model = Randomised(relu().eval(), 0.2)
    data = data_of(model.network, 24)
    counts = count(model, data, draws=2000, progress=False)
    ends = lower_ends(counts.right, counts.draws, 0.01 / 24)
    for p, delta in ((math.inf, 0.1), (math.inf, 0.25), (2, 0.2)):
        threat = wdat.Threat(delta, p, 2)
        found = attack_through(model, data, threat, m=16, steps=10)
        left = float((model.vote(found.x, 500, confidence=1e-9) == data.y).double().mean())  # it never abstains
        proved = float(accuracy_curve(vote_radii(ends, sigma=0.2, pixels=counts.pixels), delta, p))
        assert proved <= left < 1


# Statements


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_the_moment_that_the_mean_pays_for_is_large_enough(p):
    n, weight, d = 60, 0.2, 0.7
    psi, first, log_m = psi_and_excess(n, weight, d, p)
    g = torch.rand(50, generator=generator(3)).double()
    k = torch.arange(n + 1).double()
    mass = torch.distributions.Binomial(n, g[:, None]).log_prob(k).exp()
    own = psi[:, torch.searchsorted(first, k.long(), right=True) - 1]
    exact = torch.stack([(mass @ (s * own).exp().T) * (-s * bracketed(g, weight, d, p))[:, None].exp() for s in SLOPES])
    assert (log_m >= exact.log().amax(1).T).all()
    assert psi.shape[0] == len(LEVELS) and (log_m[LEVELS.index(0.3), 0] < 0.2)  # and not much larger


def drawn_counts(g: torch.Tensor, draws: int, seed: int) -> Counts:
    some = torch.full_like(g, draws, dtype=torch.int64)
    right, pilot = (torch.binomial(m.double(), g, generator=generator(seed)).long() for m in (some, some // 10))
    return Counts(right, some, pilot, draws // 10, 0.25, 18)


def test_the_mean_alone_is_missed_as_rarely_as_promised_and_pays_less():
    g, level, d = torch.rand(80, generator=generator(0)).double().pow(0.3), 0.1, 0.5
    truth = float(lower_curve(torch.special.ndtri(g), [d * 0.25], 2, sigma=0.25, pixels=18))
    bounds = torch.tensor([mean_bound(drawn_counts(g, 200, seed), d, 2, level) for seed in range(60)])
    assert (bounds > truth).float().mean() <= level + 3 * math.sqrt(level * (1 - level) / 60)
    each = lower_ends((200 * g).long(), torch.full_like(g, 200), level / 80)
    assert bounds.mean() > float(lower_curve(torch.special.ndtri(each), [d * 0.25], 2, sigma=0.25, pixels=18)) + 0.02
    assert bounds.mean() < truth


def test_many_draws_bring_the_mean_close_at_large_radii():
    """There the curve lives on images with g near 1, where counts must not be rounded to bins of one width."""
    g = torch.special.ndtr(3 + torch.randn(1000, generator=generator(0)).double())
    truth = float(lower_curve(torch.special.ndtri(g), [0.5], 2, sigma=0.25, pixels=18))
    few, many = (mean_bound(drawn_counts(g, draws, 1), 2.0, 2, 1e-4) for draws in (1000, 10_000))
    assert few < many <= truth < many + 0.01


def test_adaptive_draws_reach_the_curve_of_five_times_as_many():
    """Within half a point at a fifth of the draws, up to a radius of sigma."""
    g = torch.special.ndtr(1 + 1.5 * torch.randn(1000, generator=generator(0)).double())
    threats = [wdat.Threat(0.25 * d, 2, 2) for d in (0.25, 0.5, 1)]
    pilot = torch.binomial(torch.full_like(g, 200), g, generator=generator(1)).long()
    plan = adaptive(pilot, 200, 2000)
    assert 200 + plan.double().mean() <= 2000
    right = torch.binomial(plan.double(), g, generator=generator(2)).long()
    few, many = (
        torch.tensor([row["lower"] for row in summary(counts, threats, 0.999)["threats"]])
        for counts in (Counts(right, plan, pilot, 200, 0.25, 18), drawn_counts(g, 10_000, 3))
    )
    assert (few > many - 0.005).all()


def test_draws_go_where_they_move_the_curve():
    pilot = torch.tensor([0] * 30 + [85] * 30 + [100] * 30)
    plan = adaptive(pilot, 100, 1000)
    assert plan.double().mean() <= 900 and plan.min() >= 10
    assert plan[0] < plan[30]


# The network


def test_draws_are_reproducible_one_stream_a_call():
    model, x = Randomised(relu().eval(), 0.5), images(4)
    with torch.no_grad():
        first, second = model(x), model(x)
        model.reseed(0)
        assert torch.equal(model(x), first) and not torch.equal(first, second)
        model.reseed(1)
        assert not torch.equal(model(x), first)
    assert model.answers(x, 7).sum(1).tolist() == [7] * 4
    sure = Randomised(two_classes(), 1e-3).vote(torch.zeros(1, 2, 3, 3) + torch.eye(3) * 0.9, 50)
    assert sure.shape == (1,) and int(sure) >= 0
    assert int(Randomised(two_classes(), 5).vote(torch.full((1, 2, 3, 3), 0.501), 50)) == -1  # at the boundary


@pytest.mark.parametrize("sigma", [1e-3, 0.25, 2, 10])
def test_image_and_noise_add_up_exactly(sigma):
    """Nothing of the image but its rounded self is left in the sum (arXiv 2207.07209)."""
    x, step = images(200), step_of(sigma)
    moved, drawn = snap(x, step), noise(images(200), sigma, generator(1))
    assert torch.equal((moved + drawn).double(), moved.double() + drawn.double())
    assert torch.equal((drawn / step).frac(), torch.zeros_like(x)) and (moved - x).abs().max() <= step / 2
    assert float(drawn.std()) == pytest.approx(sigma, rel=0.05)


def test_saved_and_loaded_with_a_card(tmp_path):
    network = build("digits_cnn")
    card = wdat.save_model(Randomised(network, 0.25), tmp_path / "noisy.yaml", architecture="digits_cnn")
    loaded, x = wdat.load_model(card), images(3, (1, 8, 8))
    assert isinstance(loaded, wdat.Randomised) and loaded.sigma == 0.25
    assert torch.equal(loaded(x), Randomised(network.eval(), 0.25)(x))
    with pytest.raises(ValueError, match=r"\.network"):
        wdat.export_robustbench(loaded, tmp_path / "x.pt")


def test_where_a_randomised_network_does_not_go_the_way_is_told():
    noisy = Randomised(relu().eval(), 0.2)
    data, threat = data_of(noisy.network, 12), wdat.Threat(0.1, 2, 2)
    with pytest.raises(ValueError, match=r"sigma=0\.2.*wdat\.certify.*\.network"):
        wdat.find_ticket(noisy, data, threat, density=0.5)


def test_a_randomised_network_is_fine_tuned_behind_its_noise():
    noisy = Randomised(relu().eval(), 0.2, seed=3)
    data, plain = data_of(noisy.network, 12), {"objective": {"kind": "plain"}, "epochs": 1, "lr": 0.05}
    quiet, recipe = {"progress": False}, partial(make_recipe, seed=0)
    found = wdat.finetune(noisy, data, recipe(plain), **quiet)
    behind = wdat.finetune(noisy.network, data, recipe({**plain, "noise": 0.2}), **quiet)
    assert (found.model.sigma, found.model.seed) == (0.2, 3) and found.history == behind.history
    for own, expected in zip(found.model.network.parameters(), behind.model.parameters(), strict=True):
        assert torch.equal(own, expected)
    other = wdat.finetune(noisy, data, recipe({**plain, "noise": 0.3}), **quiet)
    assert other.history != found.history and other.model.sigma == 0.2


def test_a_randomised_network_is_evaluated_by_its_bracket():
    noisy = Randomised(relu().eval(), 0.2)
    data, threat = data_of(noisy.network, 12), wdat.Threat(0.1, 2, 2)
    found = wdat.evaluate(noisy, data, [threat], batch_size=256, progress=False)
    assert found == wdat.certify(noisy, data, [threat], attacked=12, progress=False)
    (row,) = found["bracket"]["threats"]
    assert found["bracket"]["n"] == 12 and row["lower"] == found["threats"][0]["lower"] <= row["high"]


# Counting


def test_counts_of_a_linear_network_are_those_of_its_margin():
    model = two_classes()
    x = images(40)
    data = from_tensors(x, labels(model, x, 4))
    found = count(model, data, 0.3, draws=1000, progress=False)
    g = Phi(margins(model, data.x, data.y) / 0.3)
    deviations = (found.right - found.draws * g) / (found.draws * g * (1 - g)).sqrt().clamp_min(1)
    assert deviations.abs().max() < 4.5 and deviations.square().mean() < 1.8
    certain = count(model, from_tensors(x, labels(model, x, 0)), 1e-5, draws=100, progress=False)
    assert certain.accuracy > 0.97  # sigma -> 0 on a network that is right


def test_an_interrupted_count_ends_the_same(tmp_path, monkeypatch):
    model, passes = relu().eval(), []
    data, given = data_of(model, 6), {"draws": 200, "batch_size": 64, "progress": False}
    whole = count(model, data, 0.5, **given)
    monkeypatch.setattr(counting, "WRITE", 0.0)

    def stop_at(limit: int):
        def hook(*_):
            passes.append(1)
            if len(passes) == limit:
                raise KeyboardInterrupt

        return hook

    handle = model[0].register_forward_hook(stop_at(16))
    with pytest.raises(KeyboardInterrupt):
        count(model, data, 0.5, state=tmp_path, **given)
    handle.remove()
    before = len(passes)
    handle = model[0].register_forward_hook(stop_at(10**9))
    again = count(model, data, 0.5, state=tmp_path, **given)
    handle.remove()
    assert torch.equal(again.right, whole.right) and torch.equal(again.pilot, whole.pilot)
    batches = -(-6 * 20 // 64) + -(-6 * 180 // 64)
    checks = len(passes) - batches
    assert before + (len(passes) - before) <= batches + checks  # at most the interrupted batch was drawn twice
    with pytest.raises(ValueError, match="delete"):
        next(tmp_path.glob("*.pt")).write_bytes(b"x")
        count(model, data, 0.5, state=tmp_path, **given)


@pytest.mark.parametrize("sigma", [0, -1, 10.5, math.nan, "0.1"])
def test_sigma_is_refused_outside_its_range(sigma):
    with pytest.raises(ValueError, match="sigma="):
        Randomised(relu(), sigma)


def test_what_cannot_be_counted_is_refused():
    model = relu().eval()
    data = data_of(model, 6)
    with pytest.raises(ValueError, match="draws=99"):
        count(model, data, 0.1, draws=99)
    with pytest.raises(ValueError, match="sigma is missing"):
        count(model, data)
    with pytest.raises(ValueError, match="confidence=1"):
        certify(model, data, [wdat.Threat(0.1)], 0.1, confidence=1.0)
    with pytest.raises(ValueError, match="randomised already"):
        Randomised(Randomised(model, 0.1), 0.1)
    with pytest.raises(ValueError, match=r"sigma=0\.1"):
        count(Randomised(model, 0.1), data, 0.2)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        count(batch_norm().train(), data, 0.1)
    with pytest.raises(ValueError, match="differently"):
        count(nn.Sequential(_Jitter(), *model), data, 0.1)
    with pytest.raises(ValueError, match="sigma=1"):
        count(nn.Sequential(_Overflow(), *model), data, 1.0, draws=100, progress=False)
    with pytest.raises(ValueError, match=r"p=0\.5"):
        lower_curve(torch.zeros(1), [0.1], 0.5, sigma=1.0, pixels=3)
    with pytest.raises(ValueError, match=r"-0\.1"):
        lower_curve(torch.zeros(1), [-0.1], 2, sigma=1.0, pixels=3)


class _Jitter(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class _Overflow(nn.Module):
    def forward(self, x):
        return torch.where(x > 2, math.inf, x)


# The upper side, training, the one call


def test_attacks_stay_above_the_curve_and_move_within_the_ball():
    model = Randomised(relu().eval(), 0.2)
    data = data_of(model.network, 24)
    moves, counts = ladder(model, data, [0.1, 0.3, 0.6], 2, m=8, steps=6, draws=300, progress=False)
    assert counts[0].accuracy > counts[-1].accuracy + 0.05  # it does attack
    for p in (1.5, 2, math.inf):
        for delta in (0.05, 0.2, 0.5):
            threat = wdat.Threat(delta, p, 2)
            high = upper(moves, counts, threat, 0.005)
            low = summary(counts[0], [threat], 0.99)["threats"][0]
            assert high["distance"] <= delta * (1 + 1e-5)
            assert low["lower"] <= high["high"]
            assert low["lower"] == max(low["every_image"], low["mean_alone"])
    joint = attack_through(model, data, wdat.Threat(0.2, 2, 2), m=8, steps=6)
    assert joint.distance <= 0.2 * (1 + 1e-5)


def test_the_surrogate_is_the_mean_of_its_draws():
    model, x = Randomised(relu().eval(), 0.3), images(3)
    surrogate = averaged(model, x.shape[1:], 5, seed=2)
    with torch.no_grad():
        logs = surrogate(x)
        by_hand = torch.stack([model.network(snap(x, model.step) + one).softmax(1) for one in surrogate.drawn]).mean(0)
    assert torch.allclose(logs.exp(), by_hand, atol=1e-6) and torch.equal(surrogate(x), logs)
    x.requires_grad_(True)
    surrogate(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_training_with_noise_is_a_setting_of_the_recipe():
    model = relu()
    data = data_of(model, 32)
    plain = make_recipe({"objective": {"kind": "plain"}, "epochs": 1, "lr": "1e-2"}, 0)
    noisy = make_recipe({"objective": {"kind": "plain"}, "epochs": 1, "lr": "1e-2", "noise": "0.5"}, 0)
    losses = [wdat.finetune(model, data, recipe, progress=False).history[0]["loss"] for recipe in (plain, noisy)]
    assert plain.noise == 0 and losses[0] != losses[1]
    with pytest.raises(ValueError, match=r"noise=0\.5"):
        Recipe(wdat.water_level(wdat.Threat("1/16")), noise=0.5)


def test_one_call_gives_a_record(tmp_path):
    model = relu().eval()
    data = data_of(model, 20)
    threats = [wdat.Threat(d, p, r) for r in (2, "inf") for p in (2, "inf") for d in ("1/16", "1/4")]
    found = wdat.certify(model, data, threats, 0.2, draws=200, curve=5, state=tmp_path, progress=False)
    records.write(tmp_path / "r.json", "randomised", found)
    rows = found["threats"]
    for near, far in zip(rows[::2], rows[1::2], strict=True):
        assert found["accuracy"] > near["every_image"] >= far["every_image"] >= 0
        assert near["lower"] <= near["plug_in"] and near["population"][0] <= near["every_image"]
    assert {c["p"] for c in found["curves"]} == {1.0, 2.0, "inf"} and 0 <= found["disagree"] <= 0.5
    assert found["draws"] <= 200
