"""The cost model of a training step: the fit finds the costs that made the measurements; projections by the formula."""

from itertools import pairwise

import numpy as np
import pytest

from wdat.studies.cost_model import Costs, Load, fit, project, ring_bytes

COSTS = Costs(overhead=2e-3, compute=5e-5, latency=3e-4, bandwidth=2e8)
LOADS = [Load(n, b / n, ring_bytes(4e5, n)) for n in (1, 2, 4) for b in (64, 512)]
LOADS += [Load(n, 0.0, ring_bytes(size, n), training=False) for n in (2, 4) for size in (4e3, 4e5, 4e6)]
ASSUMED = {"images": 1_281_167, "batch": 4096, "passes": 5, "images_per_second": 938.0, "parameters": 25.6e6,
           "latency": 5e-6, "bandwidth": 25e9}  # fmt: skip


def test_a_ring_sends_all_but_one_part_twice():
    """Each of n workers adds to, then hands on, n - 1 of n parts."""
    assert ring_bytes(1000, 1) == 0 and ring_bytes(1000, 2) == 1000 and ring_bytes(1000, 4) == 1500
    for n in (2, 3, 8):
        parts, sent = [1000 / n] * n, 0.0
        for _ in range(n - 1):
            sent += 2 * parts[0]  # one part to the neighbour, summing, and one again, spreading
        assert ring_bytes(1000, n) == pytest.approx(sent)


def test_the_fit_returns_the_costs_that_made_the_measurements():
    found = fit(LOADS, [COSTS.seconds(load) for load in LOADS])
    for name in ("overhead", "compute", "latency", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=1e-6)


def test_noise_of_some_percent_moves_the_costs_by_as_little():
    rng = np.random.default_rng(0)
    seconds = [COSTS.seconds(load) * rng.lognormal(0, 0.02) for load in LOADS * 20]
    found = fit(LOADS * 20, seconds)
    assert found.compute == pytest.approx(COSTS.compute, rel=0.05)
    assert found.latency == pytest.approx(COSTS.latency, rel=0.05)
    assert found.bandwidth == pytest.approx(COSTS.bandwidth, rel=0.05)


def test_no_cost_is_negative_and_what_can_not_be_told_apart_is_refused():
    found = fit(LOADS, [1e-3 / (1 + load.images) for load in LOADS])  # more images, less time: not of this model
    assert min(found.overhead, found.compute, found.latency) >= 0 and found.bandwidth > 0
    for few in (LOADS[:2], LOADS[6:]):  # one worker alone; no training
        with pytest.raises(ValueError, match="do not tell overhead, compute, latency and bandwidth apart"):
            fit(few, [COSTS.seconds(load) for load in few])
    with pytest.raises(ValueError, match="times must be positive"):
        fit(LOADS, [0.0] * len(LOADS))


def test_projected_epochs_fall_with_compute_and_level_where_bytes_rule():
    gpus = [2**k for k in range(0, 15)]
    rows = project(gpus, {"none": 1.0, "quarter": 0.25}, **ASSUMED)
    plain, quarter = ([row for row in rows if row["compression"] == name] for name in ("none", "quarter"))
    assert plain[0]["epoch"] == pytest.approx(5 * 1_281_167 / 938) and plain[0]["efficiency"] == 1
    for row in plain:
        n, size = row["gpus"], 4 * 25.6e6
        assert row["compute"] == pytest.approx(5 * 4096 / n / 938)
        assert row["bandwidth"] == pytest.approx(2 * (n - 1) / n * size / 25e9)
        assert row["latency"] == pytest.approx(2 * (n - 1) * 5e-6)
        assert row["seconds"] == pytest.approx(row["compute"] + row["bandwidth"] + row["latency"])
    epochs = [row["epoch"] for row in plain]
    assert all(b < a for a, b in pairwise(epochs[:10]))  # compute rules: falling
    assert epochs[-1] > min(epochs)  # in the end 2 (n - 1) messages cost more than compute saves
    for a, b in zip(plain[1:], quarter[1:], strict=True):
        assert b["bandwidth"] == pytest.approx(a["bandwidth"] / 4) and b["efficiency"] > a["efficiency"]
