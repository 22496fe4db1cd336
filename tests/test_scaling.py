"""Training by several workers, measured: what the study finds, and what tables, figure and paper make of it."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import yaml

import wdat
from wdat import records
from wdat.report import scaling as report
from wdat.report.numbers import cited, numbers
from wdat.reproduce import profiles
from wdat.studies import scaling as study
from wdat.studies.cost_model import Costs, Load, project, ring_bytes
from wdat.studies.scaling import launch, scaling

ROOT = Path(__file__).parents[1]
DECLARED = profiles.declared(ROOT / "notebooks/09_distributed.py")
COSTS = Costs(2e-3, 5e-5, 3e-4, 2e8)


def accuracies(value: float) -> dict:
    return {"clean": value, "pointwise": {"1/16": value - 0.1}, "optimal": {"1/16": value - 0.2}}


def made_up() -> dict:
    """A record as the notebook's defaults make it, of numbers that are known."""
    runs, shares = [], {"none": 1.0, "fp16": 0.5, "PowerSGD": 0.1, "quantised, one-sided": 0.625,
                        "quantised, two-sided": 0.25}  # fmt: skip
    for batch, compression in [(b, "none") for b in DECLARED["batches"]] + [
        (next(iter(DECLARED["batches"])), c) for c in DECLARED["compressions"]
    ]:
        for seed, lost in enumerate((0.0, 0.01, 0.02)):
            own = 0.9 - lost - {"PowerSGD": 0.02, "quantised, two-sided": 0.004}.get(compression, 0.0)
            runs.append({"batch": batch, "compression": compression, "seed": seed, "batch_size": 64,
                         "sent": 1000 * shares[compression], **accuracies(own)})  # fmt: skip
    timed = [(n, size, Load(n, size / n, ring_bytes(1000, n))) for n in (1, 2, 4) for size in (64, 256)]
    steps = [{"workers": n, "batch_size": size, "seconds": COSTS.seconds(load), "fitted": COSTS.seconds(load)}
             for n, size, load in timed]  # fmt: skip
    moves = [{"workers": n, "bytes": size, "seconds": 1e-3, "fitted": 1.1e-3}
             for n in (2, 4) for size in (4000, 400000)]  # fmt: skip
    for row in (*steps, *moves):
        row |= {"low": 0.9 * row["seconds"], "high": 1.2 * row["seconds"], "count": 20}
    return {
        "n_train": 100, "n_test": 50, "seeds": 3, "cores": 2, "workers": [1, 2, 4], "parameters": 250, "runs": runs,
        "steps": steps, "transfers": moves, "pointwise": "1/16", "threats": [wdat.Threat("1/16").describe()],
        "shares": shares, "costs": {"overhead_s": 2e-3, "compute_s_per_image": 5e-5, "latency_s_per_message": 3e-4,
                                    "bandwidth_bytes_per_s": 2e8},
        "load": [{"workers": n, "before": 0.5 * n, "after": 3.0} for n in (1, 2, 4)], "assumed": DECLARED["projection"],
        "projected": project(shares=shares, **DECLARED["projection"]),
    }  # fmt: skip


@pytest.fixture
def record(tmp_path):
    return records.write(tmp_path / "digits" / "09_distributed.json", "scaling", made_up())


def test_changes_are_paired_by_seed_and_bytes_counted(record):
    rows = {(row[0], row[1]): row for row in report.recipes(record).frame.itertuples(index=False, name=None)}
    head = list(report.recipes(record).frame.columns)
    assert rows["64, SGD", "none"][head.index("bytes a step")] == "1,000"
    two = rows["64, SGD", "quantised, two-sided"]
    assert two[head.index("bytes a step")] == "250" and two[head.index("W_∞ 1/16, change")].startswith("-0.4 ± 0.0")
    assert rows["256, LAMB", "none"][head.index("W_∞ 1/16, change")] == "–"
    for table, n in ((report.steps(record), 6), (report.projected(record), 15)):
        assert len(table.frame) == n
    assert "0.5 → 3.0" in set(report.steps(record).frame["load average"])
    assert report.costs(record).axes and record.with_suffix(".pdf").is_file()


def test_the_paper_finds_every_number_it_quotes(record):
    found = numbers(record.parent)
    wanted = [key for key in cited(ROOT / "paper")["digits"] if key.startswith("09_distributed.")]
    assert len(wanted) > 30 and not [key for key in wanted if key not in found]
    assert found["09_distributed.quantised,-two-sided.fewer"] == "4.00"
    assert found["09_distributed.within"] == "fp16, quantised, one-sided, quantised, two-sided"
    assert found["09_distributed.error.most"] == "10.0" and found["09_distributed.load.high"] == "3.0"
    assert found["09_distributed.bandwidth"] == "200" and found["09_distributed.latency"] == "300"


def rank() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), os.getpid()


@pytest.mark.slow
def test_workers_are_processes_and_handlers_of_signals_come_back():
    before = signal.getsignal(signal.SIGINT)
    found = launch(2, rank)
    assert [number for number, _ in found] == [0, 1] and len({pid for _, pid in found} | {os.getpid()}) == 3
    assert signal.getsignal(signal.SIGINT) is before and launch(1, rank) == [(0, os.getpid())]


@pytest.mark.slow
def test_a_study_measures_fits_and_resumes(tmp_path, monkeypatch):
    given = yaml.safe_load((ROOT / "notebooks/profiles/smoke.yaml").read_text())["09_distributed"]
    settings = DECLARED | given
    data = [wdat.load_data("digits", split, n=n) for split, n in (("train", 128), ("test", 48))]
    names = ("architecture", "arguments", "recipe", "workers", "batches", "compressions", "timed", "timed_epochs",
             "transfers", "pointwise", "deltas", "r", "distances", "projection")  # fmt: skip
    run = partial(scaling, *data, tmp_path, [0], **{name: settings[name] for name in names})
    found = run()
    runs = {(row["batch"], row["compression"]): row for row in found["runs"]}
    assert list(runs) == [("16, SGD", "none"), ("64, LAMB", "none"), ("16, SGD", "quantised, two-sided")]
    plain, two = runs["16, SGD", "none"], runs["16, SGD", "quantised, two-sided"]
    assert plain["sent"] == 4 * found["parameters"]  # a ring of two
    assert 0.25 < found["shares"]["quantised, two-sided"] == two["sent"] / plain["sent"] < 0.5  # norms of few weights
    assert {(row["workers"], row["batch_size"]) for row in found["steps"]} == {(n, b) for n in (1, 2) for b in (16, 64)}
    assert all(row["low"] <= row["seconds"] <= row["high"] and row["fitted"] > 0 for row in found["steps"])
    assert [(row["workers"], row["bytes"]) for row in found["transfers"]] == [(2, 4000), (2, 400000)]
    assert all(row["before"] >= 0 for row in found["load"]) and len(found["projected"]) == 6
    monkeypatch.setattr(study, "launch", None)  # nothing is trained or timed again
    assert run() == found
    with pytest.raises(ValueError, match="must be 1 and at least one larger"):
        run(workers=[2])
