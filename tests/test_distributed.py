"""Several workers against one: the joined batch, what is known of the whole set, bytes sent, workers that end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from team import CASES, N, all_cases, launch, statistics, tuned

import wdat
from wdat.threats import joint
from wdat.zoo.networks import build

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def gap(one: dict, other: dict) -> float:
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


def test_alone_everything_is_the_plain_thing():
    values = torch.rand(5)
    with joint.shared(5):
        assert joint.workers() == (0, 1) and joint.share(5) == slice(0, 5)
        assert torch.equal(joint.mean(values), values.mean()) and joint.gathered(values) is values
        assert joint.largest(values) is values and joint.drawn(torch.zeros, (2, 3)).shape == (2, 3)


@pytest.mark.slow
def test_statistics_are_those_of_the_whole_set():
    values = torch.linspace(0.1, 3, 7, dtype=torch.float64)
    whole = torch.rand(7, 2, generator=torch.Generator().manual_seed(0))
    found = launch(3, statistics)
    for own in found:
        assert float(own["mean"]) == pytest.approx(float(values.mean()), rel=1e-12) and float(own["largest"]) == 3
        assert torch.equal(own["gathered"], values)
        # three workers each differentiate their own copy of the squared mean: 3 * 2 mean / 7
        torch.testing.assert_close(own["gradient"], torch.full_like(own["gradient"], 6 * float(values.mean()) / 7))
    assert torch.equal(torch.cat([own["drawn"] for own in found]), whole)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_several_workers_train_as_one_on_the_joined_batch(count):
    """Every objective, every rule for upsilon, micro-batches, batch norm, augmentation, noise, layer-wise steps."""
    alone, found = all_cases(list(CASES)), launch(count, all_cases, list(CASES))
    for name, (weights, history) in alone.items():
        limit = 0.0 if count == 1 else 1e-6
        for own in found:
            assert gap(weights, own[name][0]) <= limit, name
            assert gap(own[name][0], found[0][name][0]) == 0, name
            for row, other in zip(history, own[name][1], strict=True):
                assert set(other) - set(row) == {"sent_bytes"}
                for key in set(row) - {"terms"}:
                    assert other[key] == pytest.approx(row[key], rel=1e-5, abs=limit), (name, key)
                for term, its in zip(row["terms"], other["terms"], strict=True):
                    assert {k: v for k, v in its.items() if k != "threat"} == pytest.approx(
                        {k: v for k, v in term.items() if k != "threat"}, rel=1e-4, abs=1e-6
                    ), name


@pytest.mark.slow
def test_compressed_gradients_train_nearly_as_well_for_fewer_bytes():
    kinds = {"none": {}, "fp16": {"kind": "fp16"}, "bf16": {"kind": "bf16"}, "powersgd": {"kind": "powersgd"},
             "one-sided": {"kind": "quantised", "both": False}, "two-sided": {"kind": "quantised"}}  # fmt: skip
    found = {name: launch(2, tuned_with, kind) for name, kind in kinds.items()}
    sent = {name: own[0][1][-1]["sent_bytes"] for name, own in found.items()}
    numbers = sum(w.numel() for w in found["none"][0][0].values())
    assert sent["none"] == 4 * numbers * 3  # a ring of two sends every number once; 3 steps an epoch
    assert sent["fp16"] == sent["bf16"] == sent["none"] / 2
    norms = 4 * 2 * 3 * 7  # of at most 7 pieces of 6 tensors, 4 bytes, both ways, 3 steps
    assert sent["none"] / 4 < sent["two-sided"] <= sent["none"] / 4 + norms
    assert 5 / 8 * sent["none"] < sent["one-sided"] <= 5 / 8 * sent["none"] + norms
    assert sent["powersgd"] < sent["none"]
    for name, own in found.items():
        assert gap(own[0][0], own[1][0]) == 0, name  # all workers go on from the same weights
        apart = gap(own[0][0], found["none"][0][0])
        assert (apart == 0) == (name == "none") and apart < 0.05, name
        assert own[0][1][-1]["loss"] == pytest.approx(found["none"][0][1][-1]["loss"], abs=0.05)


def tuned_with(kind: dict) -> tuple[dict, list[dict]]:
    torch.set_num_threads(1)
    return tuned("w-trades, memory", compression=kind)


@pytest.mark.slow
def test_a_batch_too_small_for_its_workers_is_refused():
    with pytest.raises(Exception, match=f"{N} images in micro-batches of 43 leave 1 for 2 workers"):
        launch(2, too_small)


def too_small() -> None:
    tuned("plain", batch_size=43)


@pytest.fixture
def job(tmp_path):
    """A network, a recipe and the words of the command, started with any number of workers.

    The recipe has no signs of gradients, which over hundreds of steps make much of a rounding.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        card = wdat.save_model(build("digits_cnn", width=4), tmp_path / "a.yaml", architecture="digits_cnn",
                               arguments={"width": 4})  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{objective: {kind: plain, distil: 1}, epochs: 40, batch_size: 32, lr: 0.02, augment: 1}")

    def start(out: str, count: int) -> subprocess.Popen:
        words = ["-m", "wdat.cli", "finetune", str(card), str(recipe), str(tmp_path / out), "--data", "digits",
                 "--n", "400", "--device", "cpu"]  # fmt: skip
        words = (
            [*TORCHRUN, "--nproc-per-node", str(count), "-m", "--", *words[1:]] if count else [sys.executable, *words]
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    return tmp_path, start


def worker(parent: int, rank: int) -> int:
    """The process of a rank below a launcher."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mother = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if mother == parent and f"\0RANK={rank}\0".encode() in b"\0" + (folder / "environ").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no worker {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_a_worker_killed_ends_the_job_in_a_sentence_and_any_number_goes_on(job):
    folder, start = job
    undisturbed = start("whole.yaml", 0)
    broken = start("broken.yaml", 2)
    checkpoint, deadline = folder / "broken.checkpoint", time.monotonic() + 300
    while time.monotonic() < deadline and broken.poll() is None:
        if checkpoint.is_file() and torch.load(checkpoint, weights_only=True)["step"] > 0:
            break
        time.sleep(0.05)
    os.kill(worker(broken.pid, 1), signal.SIGKILL)
    _, said = broken.communicate(timeout=300)
    ours = [line for line in said.splitlines() if line.startswith("wdat: ")]
    assert broken.returncode != 0 and len(ours) == 1, said
    assert "a worker of 2 ended in step" in ours[0] and f"of {checkpoint}" in ours[0]
    assert not (folder / "broken.yaml").exists()
    at = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < at < 40 * 12 and f"goes on from step {at} " in ours[0]
    shutil.copy(checkpoint, folder / "fewer.checkpoint")
    for process in (start("broken.yaml", 3), start("fewer.yaml", 1), undisturbed):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    one, *others = (wdat.load_model(folder / f"{name}.yaml").state_dict() for name in ("whole", "broken", "fewer"))
    assert max(gap(one, other) for other in others) < 1e-5
