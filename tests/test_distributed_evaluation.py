"""`wdat evaluate` by several workers: one record, that of one process; work shared out; a worker that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from nets import images, labels, relu
from test_distributed import ROOT, TORCHRUN, worker

import wdat
from wdat.studies import measures
from wdat.studies.cache import Cache
from wdat.training.distributed import Team
from wdat.zoo.networks import build

WORDS = ["evaluate", "net.yaml", "--data", "digits", "--n", "300", "--device", "cpu", "--steps", "4", "--dual",
         "--delta", "1/16", "2/16", "--certified", "3", "--batch-size", "64", "--autoattack", "4"]  # fmt: skip
SETTINGS = {"steps": 4, "losses": ["ce", "redlr"], "search": {"steps": 3}, "batch_size": 16, "dual": True,
            "progress": False}  # fmt: skip


def start(folder: Path, out: str, count: int) -> subprocess.Popen:
    by = (
        [*TORCHRUN, "--nproc-per-node", str(count), "-m", "--", "wdat.cli"]
        if count
        else [sys.executable, "-m", "wdat.cli"]
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*by, *WORDS, "--out", out], cwd=folder, env=environment, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluated")
    data = wdat.load_data("digits", "train", n=300)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = wdat.finetune(build("digits_cnn", width=4), data, wdat.Recipe({"kind": "plain"}, epochs=8, lr=0.05),
                             progress=False)  # fmt: skip
    wdat.save_model(made.model, place / "net.yaml", architecture="digits_cnn", arguments={"width": 4})
    return place


def finished(folder: Path, out: str, count: int) -> str:
    process = start(folder, out, count)
    said, complaint = process.communicate(timeout=900)
    assert process.returncode == 0, complaint
    return said


def results(folder: Path, out: str) -> dict:
    return json.loads((folder / out / "net.json").read_text())["results"]


@pytest.mark.slow
def test_two_and_three_workers_leave_the_record_of_one_process(folder):
    for count in (0, 1, 2, 3):
        assert finished(folder, f"by{count}", count).count("record and figures") == 1
    alone = results(folder, "by0")
    assert alone["networks"][0]["certified"] and alone["networks"][0]["dual"] and alone["networks"][0]["autoattack"]
    assert results(folder, "by1") == results(folder, "by2") == results(folder, "by3") == alone
    names = {count: {path.name for path in (folder / f"by{count}" / "net.parts").iterdir()} for count in (0, 2, 3)}
    assert names[0] == names[2] == names[3]  # so any number of workers goes on from any other's


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_a_worker_killed_ends_the_evaluation_in_a_sentence_and_any_number_goes_on(folder):
    broken, parts, deadline = start(folder, "broken", 2), folder / "broken" / "net.parts", time.monotonic() + 600
    while time.monotonic() < deadline and broken.poll() is None and len(list(parts.glob("*.pt"))) < 2:
        time.sleep(0.02)
    os.kill(worker(broken.pid, 1), signal.SIGKILL)
    _, said = broken.communicate(timeout=600)
    ours = [line for line in said.splitlines() if line.startswith("wdat: ")]
    assert broken.returncode != 0 and len(ours) == 1, said
    assert "a worker of 2 ended" in ours[0] and "goes on from what is kept in broken/net.parts" in ours[0]
    assert not (folder / "broken/net.json").exists()
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.pt")}
    finished(folder, "broken", 3)
    assert before and all(path.stat().st_mtime_ns == then for path, then in before.items())
    finished(folder, "whole", 0)
    assert results(folder, "broken") == results(folder, "whole")


class Two(Team):
    """The second of two workers, who waits for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = 1, 2

    def wait(self) -> None:
        pass


def test_workers_share_out_parts_and_whole_attacks(tmp_path, monkeypatch):
    """What the second of two has done ahead is half of it, and is not done again."""
    model = relu()
    x = images(40)
    data = wdat.from_tensors(x, labels(model, x), classes=["a", "b", "c", "d"])
    attacked, done = measures.attack, []
    monkeypatch.setattr(measures, "attack", lambda *a, **s: done.append((s["loss"], len(a[1]))) or attacked(*a, **s))
    calls = [
        (measures.attacked, data, {"threat": threat, "loss": loss, "steps": 4, "batch_size": 16, "known": None})
        for threat in (wdat.Threat(0.05, 2), wdat.Threat(0.1, 2)) for loss in ("ce", "redlr")
    ]  # fmt: skip
    kept = partial(Cache, tmp_path, model)
    kept(workers=Two()).ahead(calls)
    assert [loss for loss, _ in done] == ["redlr", "redlr"]
    kept(workers=Team()).ahead(calls)  # alone, nothing is done ahead
    assert len(done) == 2
    for function, own, settings in calls:
        kept().get(function, own, **settings)
    assert len(done) == 4
    done.clear()
    ball = {"threat": wdat.Threat(0.05, "inf"), "loss": "ce", "steps": 2, "batch_size": 16}
    monkeypatch.setattr(Two, "wait", lambda self: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        kept(workers=Two()).each(measures.attacked, data, 10, **ball)
    assert [n for _, n in done] == [10, 10]  # the second and fourth part of four


def test_every_whole_attack_of_an_evaluation_is_one_of_those_done_ahead(tmp_path, monkeypatch):
    """Nothing that `evaluate` asks of the cache image by image or as a whole was left for all workers to compute."""
    model = relu()
    x = images(40)
    data = wdat.from_tensors(x, labels(model, x), classes=["a", "b", "c", "d"])
    alone, ahead, found = Cache.ahead, set(), []

    def all_of_it(self, calls):  # as if every worker had done its share
        for function, own, settings in calls:
            self.get(function, own, **settings)
        ahead.update(path.name for path in tmp_path.glob("*.pt"))
        return alone(self, [])

    monkeypatch.setattr(Cache, "ahead", all_of_it)
    threats = [wdat.Threat(0.05, 2), wdat.Threat(0.05, "inf"), wdat.Threat(0.1, 2, 2)]
    found.append(wdat.evaluate(model, data, threats, state=tmp_path, budget_attack=True, **SETTINGS))
    assert {path.name for path in tmp_path.glob("*.pt")} == ahead
    monkeypatch.undo()
    found.append(wdat.evaluate(model, data, threats, budget_attack=True, **SETTINGS))
    assert found[0] == found[1]


def test_several_workers_need_a_folder(tmp_path):
    with pytest.raises(ValueError, match="2 workers find each other's results in files: name a folder"):
        Cache(None, relu(), workers=Two())
