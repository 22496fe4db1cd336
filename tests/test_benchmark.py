"""The benchmark of costs: its parts, and the command."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from nets import batch_norm, images
from torch import nn

from benchmarks import benchmark, scale, work

# The benchmark's own parts


def test_batch_norm_folds_into_the_convolution_before_it():
    model = batch_norm().eval()
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    other = work.folded(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in other.modules()) and isinstance(model[1], nn.BatchNorm2d)
    torch.testing.assert_close(other(images(12)), model(images(12)))


@pytest.mark.parametrize("kind", scale.MODEL)
def test_growing_sets_take_what_the_model_of_their_cost_says(kind):
    """Bytes of the tensors made, beyond the copies of the images: numbers an image, not pixels, and one batch."""
    found, model = [], benchmark.build("digits_cnn", width=4).eval()
    _, gradients, forwards = scale.MODEL[kind]
    for n in (1000, 5000):
        pixels = scale.Pixels(torch.randint(0, 256, (n, *scale.SHAPE), dtype=torch.uint8))
        with torch.no_grad():
            y = model(pixels[:]).argmax(1)
        run = scale.works(model, pixels, y)[kind]
        with benchmark.Live() as live, benchmark.counted(model) as counts:
            run()
        found.append(live.peak)
        assert counts["gradient"] == gradients * n and counts["forward"] == (gradients + forwards) * n
    predicted = scale.model_of(kind, 5000)["bytes"] - scale.model_of(kind, 1000)["bytes"]
    grown = found[1] - found[0]
    assert predicted <= grown + 1e5 and grown <= predicted + 400 * 4000
    assert scale.model_of(kind, 10)["flop"] == 10 * scale.model_of(kind, 1)["flop"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_growing_set_is_measured_in_its_own_process():
    (row,) = scale.scale([1000], torch.device("cpu"), 1, ["W-PGD"])
    assert row["seconds"] > 0 and 0 <= row["host_bytes"] < 1e9 and row["pixels_bytes"] == 64 * 1000


# The command


def test_the_command_writes_a_record_a_table_and_a_figure(tmp_path: Path):
    """On the smallest sizes: what is measured here is that it runs."""
    threads = torch.get_num_threads()
    benchmark.main(
        ["--device", "cpu", "--networks", "cnn_a", "--images", "8", "--batch", "4", "--evaluate", "8", "--rounds", "1",
         "--out", str(tmp_path / "costs.json"), "--memory", "4", "8"]
    )  # fmt: skip
    torch.set_num_threads(threads)
    tabled = {f"costs{part}.{ending}" for part in ("", "-memory") for ending in ("md", "tex")}
    assert {path.name for path in tmp_path.iterdir()} == tabled | {f"costs.{e}" for e in ("json", "pdf", "png")}
    (network,) = benchmark.records.read(tmp_path / "costs.json", "benchmark")["results"]["networks"]
    rows = {row["work"]: row for row in network["work"]}
    assert rows["W-PGD"]["passes"] == {"forward": 11, "gradient": 10, "full": 0}
    assert rows["W-TRADES step"]["passes"] == {"forward": 13, "gradient": 11, "full": 2}
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert Counter(row["work"] for row in network["work"]).most_common(1)[0][1] == 1


@pytest.mark.parametrize(
    "given, message",
    [
        (["--networks", "cnn_a"], "--images has 2 numbers for 1 networks; give one for each"),
        (["--memory", "256"], "--memory needs two sizes at least"),
    ],
)
def test_the_command_asks_before_it_measures_for_minutes(given: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cpu", *given])
    assert message in capsys.readouterr().err
