"""The benchmark of minimal distances counts what is asked and keeps the nearest point within the budget alone."""

import json
import math

import pytest
import torch
from nets import with_exact_distances

from benchmarks import nearest as benchmark


@pytest.fixture
def linear():
    model, x, y, exact = with_exact_distances(classes=2)
    return model, x, y, exact[2.0]


def test_forwards_and_backwards_are_counted_by_image_and_points_beyond_the_budget_do_not_count(linear):
    model, x, y, distance = linear
    watched = benchmark.Watched(model, x, y, 2.0, 3)
    leaf = x[[2, 5]].clone().requires_grad_()
    logits = watched(leaf)
    (gradient,) = torch.autograd.grad((logits * torch.tensor([[1.0], [0.0]])).sum(), leaf)  # of the first alone
    assert watched.forwards.tolist() == [0, 0, 1, 0, 0, 1, 0, 0] and int(watched.backwards.sum()) == 1
    assert watched.backwards[2] == 1 and gradient.any()
    weight = model[1].weight[1 - y] - model[1].weight[y]
    across = (x.flatten(1) + 1.01 * distance[:, None] * weight / weight.norm(dim=1, keepdim=True)).view_as(x)
    watched(across[[2, 5]])  # the third pass of image 2, the second of image 5
    assert watched.best[[2, 5]].tolist() == pytest.approx((1.01 * distance[[2, 5]]).tolist(), rel=1e-4)
    assert watched.best[[0, 1, 3, 4, 6, 7]].isinf().all()
    nearer = (x.flatten(1) + 1.001 * distance[:, None] * weight / weight.norm(dim=1, keepdim=True)).view_as(x)
    watched(nearer[[5, 2]])  # one more each: image 2 has none left
    assert watched.best[2] > 1.005 * distance[2] and watched.best[5] == pytest.approx(
        1.001 * float(distance[5]), rel=1e-4
    )
    with pytest.raises(benchmark.Spent):
        for _ in range(9):
            watched(x)


def test_ours_finds_the_exact_distances_of_a_linear_network_within_every_budget(linear):
    model, x, y, distance = linear
    for budget in benchmark.SETTINGS:
        found, passes = benchmark.distances(lambda *given: benchmark.ours(*given, r=2.0), model, x, y, 2.0, budget)
        assert 0 < passes <= budget and (found >= distance * (1 - 1e-5)).all()
        assert found.tolist() == pytest.approx(distance.tolist(), rel=2e-2)


@pytest.mark.parametrize("r", [2.0, math.inf])
def test_the_ladder_of_apgd_is_a_search_within_its_budget(r):
    """On a linear network it nears the exact distances from above as passes allow."""
    model, x, y, exact = with_exact_distances(classes=5)
    far = []
    for budget in benchmark.LADDER:
        found, passes = benchmark.distances(lambda *given: benchmark.ladder(*given, r=r), model, x, y, r, budget)
        assert 0 < passes <= budget and (found >= exact[r] * (1 - 1e-4)).all()
        far.append(float((found / exact[r]).clamp_max(10).mean()))
    assert far[0] > far[2] > far[3] and far[3] < 1.05


def test_optimality_is_one_at_the_best_and_nothing_without_a_flip():
    best = torch.tensor([0.1, 0.2, 0.4])
    assert benchmark.optimality(best, best) == 1
    assert benchmark.optimality(torch.full((3,), math.inf), best) == pytest.approx(0)
    # area between the curves (0.1 + 0) / 3 of the area above the best one, (0.3 + 0.2) / 3
    assert benchmark.optimality(torch.tensor([0.2, 0.2, 0.4]), best) == pytest.approx(0.8)


def test_the_command_writes_record_table_and_figure(tmp_path):
    benchmark.main([
        "--alone", "--images", "12", "--budgets", "10", "30", "--norms", "2", "--epochs", "1",
        "--out", str(tmp_path / "n.json"),
    ])  # fmt: skip
    rows = json.loads((tmp_path / "n.json").read_text())["results"]["rows"]
    assert [row["budget"] for row in rows] == [10, 30] and all(row["attack"] == "wdat" for row in rows)
    assert rows[0]["ratio"] >= rows[1]["ratio"] >= 1 and 0 <= rows[0]["optimality"] <= rows[1]["optimality"] <= 1
    assert {"n.md", "n.tex", "n.pdf", "n.png"} <= {path.name for path in tmp_path.iterdir()}


def test_other_networks_of_the_record_are_kept_where_asked(tmp_path):
    out = tmp_path / "n.json"
    given = ["--alone", "--images", "8", "--budgets", "10", "--norms", "2", "--epochs", "0", "--out", str(out)]
    benchmark.main(given)
    record = json.loads(out.read_text())
    record["results"]["rows"] = [row | {"network": "other", "budget": 30} for row in record["results"]["rows"]]
    record["config"] = {"other": record["config"].pop("digits") | {"budgets": [30]}}
    out.write_text(json.dumps(record))
    benchmark.main([*given, "--add"])
    after = json.loads(out.read_text())
    assert [row["network"] for row in after["results"]["rows"]] == ["other", "digits"]
    assert {name: asked["budgets"] for name, asked in after["config"].items()} == {"other": [30], "digits": [10]}
    table = out.with_suffix(".md").read_text().splitlines()
    assert table[0].endswith("| 10 passes | 30 passes |") and [line.count("–") for line in table[2:]] == [1, 1]
