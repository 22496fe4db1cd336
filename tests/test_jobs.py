"""Independent runs side by side: the same results in the list's order, nothing lost and nothing left behind."""

import gc
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import joblib
import psutil
import pytest
import torch
from joblib.externals.loky import process_executor
from repository import assert_they_end

from wdat.studies import jobs
from wdat.studies.jobs import Run


def square(x: float) -> float:
    return x * x


def where(x: int) -> tuple[int, int, int]:
    time.sleep(0.05)
    return x, os.getpid(), torch.get_num_threads()


def die(mark: Path) -> int:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1


def refuse() -> None:
    raise ValueError("the number 7 does not fit; take 6")


def noise(seed: int) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(300, 300)
        return torch.linalg.solve(x, x @ x.T)


def children() -> set[str]:
    """What a call could leave: processes, its semaphores and folders."""
    jobs.close()
    gc.collect()
    below = psutil.Process().children(recursive=True)
    found = {f"process {p.pid}" for p in below if "resource_tracker" not in " ".join(p.cmdline())}
    for folder, mark in (("/dev/shm", "loky"), ("/tmp", "joblib")):
        found |= {str(path) for path in Path(folder).glob(f"*{mark}*{os.getpid()}*")}
    return found


def nothing_stays(before: set[str], seconds: float = 10) -> bool:
    """Whether what is there is what was there; a pool's threads end a moment after it."""
    end = time.monotonic() + seconds
    while (after := children()) - before and time.monotonic() < end:
        time.sleep(0.1)
    return not after - before


@pytest.mark.slow
def test_results_come_in_the_order_of_the_list_from_workers_of_one_thread():
    before, threads = children(), torch.get_num_threads()
    found = jobs.run_all([Run(str(x), where, {"x": x}) for x in range(6)], 3, progress=False)
    assert [x for x, _, _ in found] == list(range(6)) and {n for *_, n in found} == {1}
    workers = {pid for _, pid, _ in found}
    assert len(workers) == 3 and os.getpid() not in workers
    assert jobs.run_all([Run("one", where, {"x": 0})], 3, progress=False) == [(0, os.getpid(), 1)]
    assert torch.get_num_threads() == threads
    assert jobs.run_all([], 3, progress=False) == []
    assert nothing_stays(before)


def test_numbers_do_not_depend_on_the_number_of_jobs():
    runs = [Run(str(seed), noise, {"seed": seed}) for seed in range(5)]
    one, three = (jobs.run_all(runs, n, progress=False) for n in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.slow
def test_a_killed_worker_is_named_and_takes_no_other_run_with_it(tmp_path):
    """In a process of its own: a semaphore of the lost worker's pool stays until that process ends, and no longer."""
    code = f"""
        import os, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_jobs import die, square
        from wdat.studies import jobs
        from wdat.studies.jobs import Run
        if __name__ == "__main__":
            runs = [Run(f"run {{x}}", square, {{"x": x}}) for x in range(4)]
            runs.insert(1, Run("the heavy one", die, {{"mark": Path({str(tmp_path / "mark")!r})}}))
            try:
                jobs.run_all(runs, 2, progress=False)
            except jobs.WorkerKilled as error:
                print(error)
            print(jobs.run_all(runs, 2, progress=False), os.getpid())
    """
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(code))
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "the worker of run the heavy one (SIGKILL) was killed" in ran.stdout
    assert "1 of 5 runs lost their worker: the heavy one (SIGKILL); out of" in ran.stdout
    *found, pid = ran.stdout.splitlines()[-1].rsplit(" ", 1)
    assert found == ["[0.0, 1, 1, 4, 9]"] or found == ["[0, 1, 1, 4, 9]"]
    assert not [*Path("/dev/shm").glob(f"*{pid}*"), *Path("/tmp").glob(f"*joblib*{pid}*")]


def grow(x: int) -> int:
    """To loky, every worker has grown too large after its second run."""
    process_executor._MAX_MEMORY_LEAK_SIZE, process_executor._MEMORY_LEAK_CHECK_DELAY = -math.inf, 0
    return x


@pytest.mark.slow
def test_a_worker_that_has_grown_is_replaced_without_a_word(capfd):
    before = children()
    assert jobs.run_all([Run(str(x), grow, {"x": x}) for x in range(6)], 2, progress=False) == list(range(6))
    assert capfd.readouterr().err == "" and nothing_stays(before)


@pytest.mark.slow
def test_the_error_of_a_run_is_raised_as_it_is_and_ends_the_others(tmp_path):
    before, start = children(), time.perf_counter()
    long = Run("long", sleep_and_mark, {"seconds": 200, "mark": tmp_path / "woke"})
    runs = [Run("bad", refuse), long, *(Run(str(x), where, {"x": x}) for x in range(3))]
    with pytest.raises(ValueError, match="the number 7 does not fit; take 6"):
        jobs.run_all(runs, 2, progress=False)
    assert time.perf_counter() - start < 200 and nothing_stays(before) and not (tmp_path / "woke").exists()


def sleep_and_mark(seconds: float, mark: Path) -> None:
    mark.with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(seconds)
    mark.touch()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path, sent):
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_jobs import sleep_and_mark
        from wdat.studies.jobs import Run, run_all
        folder = Path({str(tmp_path)!r})
        run_all([Run(str(n), sleep_and_mark, {{"seconds": 300, "mark": folder / str(n)}}) for n in range(3)], 2)
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    parent = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    marks = [tmp_path / f"{n}.pid" for n in range(2)]
    deadline = time.monotonic() + 60
    while not all(mark.exists() and mark.read_text() for mark in marks):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    below = psutil.Process(parent.pid).children(recursive=True)
    workers = [psutil.Process(int(mark.read_text())) for mark in marks]
    assert set(workers) <= set(below)
    os.kill(parent.pid, sent)
    assert_they_end(workers)
    parent.wait(20)
    assert not psutil.wait_procs(below, timeout=20)[1]
    assert not list(Path("/dev/shm").glob(f"*loky*{parent.pid}*"))


def test_how_many_jobs_the_machine_allows(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    monkeypatch.setattr(jobs, "free_memory", lambda: 10e9)
    assert jobs.how_many() == 8 and jobs.how_many(memory=1e9) == 8
    assert jobs.how_many(memory=3e9) == 3 and not capsys.readouterr().out
    assert jobs.how_many(memory=20e9) == 1
    assert "one run needs about 20 GB and 10 GB are free" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert jobs.how_many() == 1
    with pytest.raises(ValueError, match="jobs=-1 must be 0"):
        jobs.run_all([Run("a", square, {"x": 1})], -1)


def test_memory_is_read_within_the_limits_of_a_container(tmp_path, monkeypatch):
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(jobs, "CGROUPS", [(limit, used)])
    outside = jobs.free_memory()
    assert 1e6 < outside < float("inf")
    limit.write_text("3000\n"), used.write_text("1000\n")
    assert jobs.free_memory() == 2000
    limit.write_text("max\n")
    assert jobs.free_memory() > 1e6 and jobs.resident() > 1e7


def test_the_time_left_is_that_of_the_runs_that_were_computed():
    assert jobs._left([0.01, 0.02, 60.0, 62.0], total=8, jobs=2) == "about 2:02 left"
    assert jobs._left([0.0], total=3, jobs=1) == "about 0:00 left"


def test_a_cluster_computes_the_same_list():
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    runs = [Run(str(seed), noise, {"seed": seed}) for seed in range(4)]
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        found = jobs.run_all([*runs, *(Run(str(x), where, {"x": x}) for x in range(40))], progress=False)
    assert all(torch.equal(a, b) for a, b in zip(found, jobs.run_all(runs, 1, progress=False), strict=False))
    assert [x for x, _, _ in found[4:]] == list(range(40))
    workers = {pid for _, pid, _ in found[4:]}
    assert len(workers) == 2 and os.getpid() not in workers
