"""The benchmark's reference procedure does what was published: radii below the margin, abstentions, equal draws."""

import torch
from nets import counting, generator
from torch import nn

from benchmarks import certify as benchmark
from wdat.report.table import Table
from wdat.zoo.data import from_tensors


def test_published_radii_lie_below_the_margin_and_close():
    x = torch.rand(12, 1, 4, 4, generator=generator(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 16, generator=generator(1)))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
        gap = (model(x)[:, 0] - model(x)[:, 1]) / (model[1].weight[0] - model[1].weight[1]).norm()
    y = (gap < 0).long()
    y[0] = 1 - y[0]
    data = from_tensors(x, y, classes=[str(k) for k in range(10)])
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        with counting(model) as passes:
            radii = benchmark.published(model, data, 0.5, 2100, 500)
        share = benchmark.plain(model, data, 0.5, 2000, 500) / 2000
    assert passes["no_grad"] == 12 * 2100 and float(radii[0]) == 0
    own = gap.abs()[1:].double()
    assert (radii[1:] <= own).all() and (radii[1:] > own - 0.1 - 0.1 * own)[own > 0.1].all()
    g = torch.special.ndtr(torch.where(y == (gap < 0).long(), gap.abs(), -gap.abs()) / 0.5)
    assert (share - g).abs().max() < 5 * 0.5 / 2000**0.5


def test_the_command_writes_its_record_and_tables(tmp_path):
    benchmark.main([
        "--images", "6", "3", "--draws", "200", "300", "--rounds=1", "--epochs=1", "--deltas=1/4",
        "--out", str(tmp_path / "c.json"),
    ])  # fmt: skip
    table = benchmark.speeds(tmp_path / "c.json")
    assert isinstance(table, Table) and len(table.frame) == 6
    assert {"c.md", "c-curves.md", "c.tex"} <= {path.name for path in tmp_path.iterdir()}
    sizes = benchmark.records.read(tmp_path / "c.json", "certify-benchmark")["results"]["sizes"]
    assert [(size["n"], size["draws"]) for size in sizes] == [(6, 200), (3, 300)]
    rows = [row for size in sizes for row in size["curves"]]
    assert len(rows) == 4 and all(0 <= row["vote"] <= 1 and 0 <= row["one_draw"] <= 1 for row in rows)
