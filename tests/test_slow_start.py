"""Slow start, fast decay: what is trained, what it costs in passes, last and best epoch; resumes."""

import json

import pytest
import torch
from nets import images, labels, relu

from wdat.report import companions
from wdat.studies.checkpoints import Measures
from wdat.studies.slow_start import slow_start
from wdat.threats.ball import Threat
from wdat.zoo.data import from_tensors

BASE = {"objective": {"kind": "at", "delta": 0.05, "steps": 2}, "epochs": 2, "lr": 0.05, "batch_size": 16}
VARIANTS = [
    {"name": "slow start", "schedule": "slow-start-fast-decay"},
    {"name": "scratch", "init": "scratch", "sweep": [{"epochs": 1}, {"epochs": 2}]},
    {"name": "W-TRADES", "objective": {"kind": "w-trades", "delta": 0.05, "steps": 2}},
    {"name": "wild", "lr": 1e30},
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    model = relu(seed=3).eval()
    x = images(60, seed=3)
    data = from_tensors(x, labels(model, x), classes=["a", "b", "c", "d"])
    measures = Measures(Threat(0.05, float("inf")), [Threat(0.03, 2), Threat(0.05, 2)], steps=4, search={"steps": 4})
    work = tmp_path_factory.mktemp("work")

    def run():
        return slow_start(model, data, data.take(30), BASE, VARIANTS, [0, 1], measures, work, validation=0.2,
                          natural=7, best=["scratch"], progress=False)  # fmt: skip

    return run


def test_cost_is_counted_and_a_run_that_diverges_is_listed(study):
    found = study()
    json.dumps(found)
    rows = {(run["variant"], run["seed"]): run for run in found["runs"]}
    assert [run["variant"] for run in found["diverged"]] == ["wild", "wild"]
    assert rows["slow start", 0]["passes"] == 2 * (2 + 1) and rows["scratch (epochs 1)", 0]["passes"] == 3  # E (K + 1)
    assert rows["W-TRADES", 0]["passes"] == 2 * (2 + 1 + 2)  # the budgets' gradient, clean and attacked outer passes
    assert rows["scratch (epochs 2)", 1]["scratch"] and not rows["slow start", 1]["scratch"]
    assert [row["lr"] for row in rows["slow start", 0]["history"]] == [0.05, 0.025]
    assert all(("best" in run) == run["variant"].startswith("scratch") for run in found["runs"])
    for run in found["runs"]:
        values = [row["validation_w_pgd"] for row in run["history"]]
        assert run["gap"] == max(values) - values[-1] >= 0 and values[run["epoch"] - 1] == max(values)
        assert run["last"]["nearest"] <= run["last"]["pgd"] <= run["last"]["clean"]
        assert run["last"]["optimal"]["0.05"] <= run["last"]["optimal"]["0.03"]
    assert study() == found  # all read back

    told = companions.COMPANIONS["slow-start"](found)
    assert told["slow-start.total"] == "13" and told["scratch-epochs-1.total"] == "3"
    assert told["natural.pgd"] == f"{100 * found['natural']['last']['pgd']:.1f}"


def test_autoattack_of_the_first_seed_where_the_best_epoch_is_asked_for():
    model = relu(seed=3).eval()
    x = images(8, seed=3)
    data = from_tensors(x, labels(model, x), classes=["a", "b", "c", "d"])
    measures = Measures(Threat(0.05, float("inf")), [Threat(0.03, 2)], 4, {"steps": 4}, autoattacked=4)
    found = measures.of(model, data, None, autoattack=True)
    assert found["autoattack_n"] == 4 and found["autoattack"] <= 1
    with torch.no_grad():
        assert found["clean"] == pytest.approx(float((model(x).argmax(1) == data.y).double().mean()))
    assert "autoattack" not in measures.of(model, data, None)
