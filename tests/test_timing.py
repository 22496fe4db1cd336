"""The model of how long a profile takes on how many cores, on made-up seconds; seeds stacked in one step."""

import pytest
import torch

from benchmarks import seeds, timing
from wdat.zoo.networks import build


def entry(serial, runs, jobs, slower=1.0):
    """A notebook's state whose one list of equal runs was computed by `jobs` workers, which took 2 seconds to start."""
    rounds = -(-runs // jobs)
    spent = {"lists": 10 * rounds * slower, "runs": 10 * runs * slower, "longest": 10 * slower * (runs > 0)}
    spent |= {"waiting": 2.0 * jobs} if runs and jobs > 1 else {}
    return {"seconds": serial + spent["lists"], "spent": spent}


def state(jobs, slower=1.0):
    return {"00_a": entry(5, 12, jobs, slower), "01_b": entry(7, 2, jobs, slower), "02_c": entry(3, 0, jobs, slower)}


NEEDS = {"00_a": [], "01_b": ["00_a"], "02_c": ["00_a"]}


def test_the_model_spreads_all_work_and_ends_at_what_must_follow_on_another():
    found = timing.results(state(1), state(2, 1.2), 2, [0, 0], [98, 156], NEEDS)
    rows = {row["cores"]: row for row in found["rows"]}
    assert found["slowdown"] == pytest.approx(1.2)
    assert rows[1]["measured"] == 156 and rows[1]["model"] == pytest.approx(15 + 140)
    work = 15 + 1.2 * 140
    assert rows[2]["measured"] == 98 and rows[2]["model"] == pytest.approx(work / 2 + 2 * 2)  # two starts, one by one
    assert rows[2]["efficiency"] == pytest.approx(156 / 98 / 2)
    assert rows[4]["measured"] is None and rows[4]["model"] == pytest.approx(work / 4 + 2 * 2)
    chain = 5 + 12 + 2 + 7 + 12 + 2  # of the first notebook and the second, which needs it
    assert rows[16]["model"] == pytest.approx(chain) and rows[8]["efficiency"] > rows[16]["efficiency"]


def test_notebooks_timed_only_among_others_are_scaled_by_those_timed_both_ways():
    one = {"00_a": state(1)["00_a"]}
    found = timing.results(one, state(2, 1.5), 2, [0, 0], [120, 125], NEEDS)
    assert found["notebooks"]["01_b"] == pytest.approx({"serial": 7, "runs": 20, "longest": 10, "starts": 4})
    assert found["notebooks"]["00_a"] == pytest.approx({"serial": 5, "runs": 120, "longest": 10, "starts": 4})
    rows = {row["cores"]: row for row in found["rows"]}
    assert rows[1]["measured"] is None and rows[1]["model"] == pytest.approx(155)  # as if timed
    said = timing.sentence({"results": found, "provenance": {"device": "a CPU"}})
    assert said == (
        "`make reproduce` took 2 minutes on 2 cores of a CPU, 3 on one (by the model); by the model of "
        "`benchmarks/timing.py` 1 on 4, 1 on 8, 1 on 16.\n"
    )


def test_networks_stacked_have_the_gradients_of_each_alone():
    torch.manual_seed(0)
    models = [build("digits_cnn", width=2).eval() for _ in range(2)]
    x, y = torch.rand(2, 5, 1, 8, 8), torch.randint(10, (2, 5))
    for one, other in zip(seeds.apart(models, x, y), seeds.stacked(models, x, y), strict=True):
        torch.testing.assert_close(one, other)
