"""Notebooks at the same time: each after those it needs, one budget for all runs, every file with its own notebook."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from repository import HEAD, assert_they_end, notebook, said

from wdat.reproduce import execution, profiles
from wdat.reproduce.runner import reproduce
from wdat.studies import jobs


def needing(*numbers: str) -> str:
    """The head of a notebook that says what it needs."""
    return HEAD.replace('["parameters"]', f'["parameters"] needs={json.dumps(numbers)}')


@pytest.fixture
def three(repo):
    """Two notebooks that need nothing, one that needs the second, and one of a user's own, which says nothing."""
    for name, head in {
        "01_first": needing(),
        "02_second": needing(),
        "03_third": needing("02"),
        "04_own": HEAD,
    }.items():
        notebook(repo, name, "pass", head=head)
    return repo


@pytest.fixture
def timeline(three, monkeypatch):
    """Notebooks that only pretend to run, by `parts`; when each began and ended, in order."""
    found, parts, lock = [], {}, threading.Lock()

    def execute(source, executed, passed, scratch, told, root, screen):
        with lock:
            found.append(f"{source.stem[:2]} begins")
        parts.get(source.stem[:2], lambda _: None)(told)
        executed.write_text("{}")
        with lock:
            found.append(f"{source.stem[:2]} ends")
        return 0.0

    monkeypatch.setattr(execution, "execute", execute)
    return found, parts


def test_who_needs_whom_is_said_by_each_notebook_and_an_own_one_needs_all_before_it(three):
    assert profiles.needed(profiles.notebooks(three)) == {
        "01_first": [], "02_second": [], "03_third": ["02_second"],
        "04_own": ["01_first", "02_second", "03_third"],
    }  # fmt: skip
    notebook(three, "05_last", head=needing("03"))
    assert profiles.needed(profiles.notebooks(three))["05_last"] == [
        "02_second",
        "03_third",
    ]  # itself or through others
    notebook(three, "03_third", head=needing("04"))
    with pytest.raises(ValueError, match=r"03_third.py needs '04'; numbers of notebooks before it: 01, 02"):
        reproduce()


def test_independent_notebooks_overlap_and_one_that_needs_another_waits(timeline):
    found, parts = timeline
    both, over = threading.Barrier(2), threading.Event()
    parts["01"] = lambda _: (both.wait(20), over.wait(20))
    parts["02"] = lambda _: both.wait(20)
    parts["03"] = lambda _: over.set()  # while the first is not over
    ran = reproduce(jobs=2)
    assert set(found[:2]) == {"01 begins", "02 begins"} and found[2] == "02 ends"
    assert found.index("03 begins") < found.index("01 ends") and found[-2:] == ["04 begins", "04 ends"]
    assert set(ran) == {"01_first", "02_second", "03_third", "04_own"} and ran[-1] == "04_own"


def test_no_more_notebooks_at_the_same_time_than_jobs(timeline):
    found, _ = timeline
    reproduce(jobs=1)
    assert found == [f"{number} {word}" for number in ("01", "02", "03", "04") for word in ("begins", "ends")]


def test_others_go_on_without_one_that_stops_and_without_those_that_need_it(timeline, capsys):
    found, parts = timeline
    stopped = threading.Event()

    def fail(_) -> None:
        stopped.set()
        raise execution.CellFailed("02_second failed in cell [1]")

    parts["01"], parts["02"] = lambda _: stopped.wait(20), fail
    with pytest.raises(execution.CellFailed, match=r"^02_second failed in cell \[1\]$"):
        reproduce(jobs=2)
    assert "01 ends" in found and not {"03 begins", "04 begins"} & set(found)
    assert "02_second stopped" in said(capsys)
    parts.clear()
    assert reproduce(jobs=2) == ["02_second", "03_third", "04_own"]


def test_a_file_belongs_to_the_notebook_that_wrote_it_although_another_ran(timeline, three):
    _, parts = timeline
    both, made = threading.Barrier(2), three / ".wdat/digits/made"

    def writes(name):
        def part(told) -> None:
            both.wait(20)
            path = three / "figures/digits" / name
            path.write_text("1")
            with open(told["WDAT_WRITTEN"], "a") as file:  # as `records.write_file` does
                file.write(f"{os.path.realpath(path)}\n")
            (made / f"{name}.pt").write_text("by other means")
            both.wait(20)

        return part

    parts["01"], parts["02"] = writes("a.json"), writes("b.json")
    reproduce(only=["01", "02"], jobs=2)
    state = json.loads((three / ".wdat/digits/state.json").read_text())
    outputs = {name: {Path(path).name for path in entry["outputs"]} for name, entry in state.items()}
    assert "a.json" in outputs["01_first"] and "b.json" not in outputs["01_first"]
    assert "b.json" in outputs["02_second"] and "a.json" not in outputs["02_second"]
    assert {"a.json.pt", "b.json.pt"} <= outputs["01_first"] | outputs["02_second"]


def test_a_slot_is_waited_for_and_let_go(tmp_path, monkeypatch):
    monkeypatch.setenv("WDAT_SLOTS", str(tmp_path))
    (tmp_path / "0").touch(), (tmp_path / "1").touch()
    inside, most = [], []

    def hold() -> None:
        with jobs.slot():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(6)]
    [thread.start() for thread in threads], [thread.join(20) for thread in threads]
    assert len(most) == 6 and max(most) == 2
    with jobs.slot(), jobs.slot(), pytest.raises(jobs._Closed), jobs.slot(lambda: False):
        pass
    code = "import os, signal\nfrom wdat.studies import jobs\nwith jobs.slot(), jobs.slot(): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    with jobs.slot(lambda: False), jobs.slot(lambda: False):
        pass
    for count, left in ((1, 1), (2, 0), (4, 0)):  # four processes of a budget of two take all of it
        with jobs.slots(count), contextlib.ExitStack() as others:
            for _ in range(left):
                others.enter_context(jobs.slot(lambda: False))
            with pytest.raises(jobs._Closed), jobs.slot(lambda: False):
                pass
    monkeypatch.delenv("WDAT_SLOTS")
    with jobs.slots(2):
        pass


RUNS = f"""from wdat import records
from wdat.studies.jobs import Run, run_all
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_side_by_side import marked
names = [__NAME__ + str(k) for k in range(4)]
found = run_all([Run(name, marked, {{"mark": work / name}}) for name in names], 2)
records.write_file(out / (__NAME__ + ".json"), json.dumps(sum(found)))"""


def marked(mark: Path) -> int:
    """A run: when it began and ended."""
    begun = time.time()
    time.sleep(1)
    mark.write_text(f"{begun} {time.time()}")
    return len(mark.name)


@pytest.mark.slow
def test_one_budget_serves_the_runs_of_all_notebooks(three):
    for name in ("01_first", "02_second"):
        notebook(three, name, RUNS.replace("__NAME__", repr(name[3:])), head=needing())
    reproduce(only=["01", "02"], jobs=2)
    times = [tuple(map(float, path.read_text().split())) for path in (three / ".wdat/digits/made").glob("[fs]*")]
    assert len(times) == 8
    assert max(sum(begun <= at < ended for begun, ended in times) for at, _ in times) == 2
    state = json.loads((three / ".wdat/digits/state.json").read_text())
    assert "figures/digits/second.json" in state["02_second"]["outputs"]
    assert "figures/digits/second.json" not in state["01_first"]["outputs"]
    numbers = [json.loads((three / f"figures/digits/{name}.json").read_text()) for name in ("first", "second")]
    assert numbers == [4 * len("first0"), 4 * len("second0")]


@pytest.mark.slow
def test_an_interrupt_ends_all_notebooks_that_run(three):
    sleep = f"""from wdat.studies.jobs import Run, run_all
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_jobs import sleep_and_mark
run_all([Run(str(k), sleep_and_mark, {{"seconds": 300, "mark": work / (__NAME__ + str(k))}}) for k in range(3)], 2)"""
    for name in ("01_first", "02_second"):
        notebook(three, name, "(work / __NAME__).write_text('here')".replace("__NAME__", repr(name)),
                 sleep.replace("__NAME__", repr(name)), head=needing())  # fmt: skip
    words = [sys.executable, "-m", "wdat.cli", "reproduce", "--jobs", "2"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    made, deadline = three / ".wdat/digits/made", time.monotonic() + 120
    while len(list(made.glob("*.pid"))) < 2 or not all((made / name).exists() for name in ("01_first", "02_second")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    kernels = [p for p in below if "ipykernel_launcher" in p.cmdline()]
    workers = [psutil.Process(int(mark.read_text())) for mark in made.glob("*.pid")]
    assert len(kernels) == 2 and len(workers) == 2  # the budget
    os.kill(process.pid, signal.SIGINT)
    assert_they_end(workers + kernels)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and error == "wdat: interrupted; run the same command again to resume\n"
    assert not psutil.wait_procs(below, timeout=20)[1]
    assert not [p for kernel in kernels for p in Path("/dev/shm").glob(f"*loky-{kernel.pid}-*")]
