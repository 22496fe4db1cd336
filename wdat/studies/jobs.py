"""Independent runs side by side: a list of functions with their settings in, their results out, in the list's order.

A run is a pure function of its settings and computes with one thread, so what it finds does not depend on how many
run at once, where, or in which order. `joblib.Parallel` hands the list out. On this machine every one of its threads
has a worker process of its own (loky's), so that a worker that is killed takes one run with it, which is then known
by name. Inside `joblib.parallel_config(backend="dask")`, or "ray", a cluster's workers compute the same list.

Notebooks that run at the same time share one budget: every run holds one of the files in the folder WDAT_SLOTS, locked,
and a lock ends with the process that has it. Whoever computes keeps its slot from run to run; others wait for a gap.
"""

import atexit
import contextlib
import fcntl
import os
import queue
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import joblib
import torch
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm.auto import tqdm

from wdat import clock

WORKING = {  # environment of a worker: one thread; room for what oneDNN compiles for batches of many sizes
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
}  # fmt: skip
IDLE = 60  # seconds that a worker waits for its next run: starting one takes some
CGROUPS = (  # bytes allowed and used in a container, versions 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class WorkerKilled(RuntimeError):
    """Workers were killed from outside; the message names their runs. All others are finished and kept."""


@dataclass(frozen=True)
class Run:
    """A function of the library, settings that can be pickled, and a name for messages."""

    name: str
    function: Callable
    settings: dict = field(default_factory=dict)


class _Closed(RuntimeError):
    """The workers were ended while a run waited for its turn."""


@dataclass(frozen=True)
class _Done:
    number: int
    value: Any = None
    seconds: float = 0.0
    processor: float = 0.0  # seconds that it had of one core: among other work, fewer
    held: float = 0.0  # seconds that it had a slot: with the start of its worker
    spent: dict = field(default_factory=dict)
    process: int = 0
    killed: str = ""  # by which signal


def run_all(
    runs: Sequence[Run], jobs: int = 0, *, desc: str = "runs", memory: float = 0, progress: bool = True
) -> list:
    """What every run returns, in the order of the list; `jobs` at once, 0 for `how_many` there may be.

    memory: bytes one run needs. With one job, or one run, all is computed in this process. The first error of a run
    ends the others and is raised. WorkerKilled, once all others are done, if workers were killed.
    """
    if jobs < 0:
        raise ValueError(f"jobs={jobs} must be 0 (as many as the machine allows) or at least 1")
    jobs = max(1, min(jobs or how_many(memory), len(runs)))
    found, killed, ended, begun = [None] * len(runs), [], [], time.perf_counter()
    with (
        tqdm(total=len(runs), desc=desc, disable=not progress, leave=False,
             bar_format="{desc}: {n_fmt} of {total_fmt} runs, {elapsed} so far{postfix}") as bar,
        _handed_out(runs, jobs) as outcomes,
    ):  # fmt: skip
        for done in outcomes:
            found[done.number] = done.value
            ended.append(done)
            if done.process != os.getpid():
                clock.add(done.spent)
            if done.killed:
                killed.append(f"{runs[done.number].name} ({done.killed})")
                tqdm.write(f"the worker of run {killed[-1]} was killed; out of memory? The other runs go on")
            bar.set_postfix_str(_left([done.seconds for done in ended], len(runs), jobs), refresh=False)
            bar.update()
    used = [done.processor for done in ended]
    waited = sum(done.held - done.seconds for done in ended if done.held)
    lists = {"lists": time.perf_counter() - begun, "runs": sum(used), "longest": max(used, default=0.0)}
    clock.add(lists | ({"waiting": waited} if jobs > 1 else {}), jobs)
    if killed:
        raise WorkerKilled(
            f"{len(killed)} of {len(runs)} runs lost their worker: {', '.join(killed)}; out of memory? The others are "
            f"kept, the same call does what is missing: with fewer than {jobs} jobs if memory was short"
        )
    return found


def how_many(memory: float = 0) -> int:
    """Runs of `memory` bytes each that this machine may compute at once; one where they compute on a GPU.

    Cores by affinity and by the limits of a container (`joblib.cpu_count`), memory by what is free within them; inside
    `joblib.parallel_config`, what that says or its cluster has.
    """
    if backend := _cluster():
        return backend.effective_n_jobs(joblib.parallel.get_active_backend()[1] or -1)
    if torch.cuda.is_available():
        return 1
    cores, free = joblib.cpu_count(), free_memory()
    if memory > free:
        tqdm.write(
            f"one run needs about {memory / 1e9:.2g} GB and {free / 1e9:.2g} GB are free: it may be killed; take fewer "
            "images, smaller batches (accumulate) or a machine with more memory"
        )
    return max(1, min(cores, int(free / memory) if memory else cores))


def free_memory() -> float:
    """Bytes of main memory that are free for new processes, within the limits of a container; inf if unknown."""
    free = [float("inf")]
    with contextlib.suppress(OSError, AttributeError):
        free.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]))
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(min(free), 0)


def resident() -> float:
    """Bytes this process has held at most: data and networks loaded, what any worker holds before it starts."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# How a list is handed out


class _Workers:
    """Processes of this one, each for one run at a time; made when first needed, and anew after one was killed."""

    def __init__(self) -> None:
        self.idle: queue.SimpleQueue[ProcessPoolExecutor] = queue.SimpleQueue()
        self.made: list[ProcessPoolExecutor] = []

    def compute(self, number: int, one: Run) -> _Done:
        with slot(lambda: _workers.get(os.getpid()) is self):
            begun = time.perf_counter()
            done = self._compute(number, one)
            return replace(done, held=time.perf_counter() - begun)

    def _compute(self, number: int, one: Run) -> _Done:
        try:
            worker = self.idle.get_nowait()
        except queue.Empty:
            worker = ProcessPoolExecutor(1, timeout=IDLE, initializer=_begin, initargs=(os.getpid(),), env=WORKING)
            self.made.append(worker)
        try:
            done = worker.submit(_computed, number, one).result()
        except TerminatedWorkerError as error:
            self.made.remove(worker)
            worker.shutdown()
            name = re.search(r"SIG\w+", str(error))
            return _Done(number, killed=name[0] if name else "it ended by itself")
        self.idle.put(worker)
        return done


@contextmanager
def slot(wanted: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """One of the places of the budget that notebooks share, for as long as this is entered; none if there is no budget.

    wanted: whether to go on waiting for it.
    """
    folder, free = os.environ.get("WDAT_SLOTS"), None
    with contextlib.ExitStack() as held:
        while folder and free is None:
            for path in sorted(Path(folder).iterdir()):
                file = path.open("a")
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    free = held.enter_context(file)
                    break
                file.close()
            if free is None:
                if not wanted():
                    raise _Closed
                time.sleep(0.03)
        yield


@contextmanager
def slots(count: int) -> Iterator[None]:
    """So many places of the budget, or all of it if that is fewer: for what starts processes of its own."""
    folder = os.environ.get("WDAT_SLOTS")
    with contextlib.ExitStack() as held:
        for _ in range(min(count, len(list(Path(folder).iterdir()))) if folder else 0):
            held.enter_context(slot())
        yield


_workers: dict[int, _Workers] = {}  # by process, so that a forked one finds none


def close() -> None:
    """End the workers that wait for the next list; they also end by themselves after a while, or with this process."""
    if workers := _workers.pop(os.getpid(), None):
        for worker in workers.made:
            worker.shutdown(kill_workers=True)


atexit.register(close)


@contextmanager
def _handed_out(runs: Sequence[Run], jobs: int) -> Iterator[Iterator[_Done]]:
    """Outcomes, as runs end. If this is left by an exception, no worker goes on."""
    if jobs == 1 and not _cluster():
        yield (_in_turn(number, one) for number, one in enumerate(runs))
        return
    if not _cluster():
        _workers.setdefault(os.getpid(), _Workers())
    hands = joblib.Parallel(n_jobs=jobs, prefer="threads", batch_size=1, return_as="generator_unordered")
    try:
        with warnings.catch_warnings():  # loky replaces a worker that has grown: between two runs, so nothing is lost
            warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
            yield hands(joblib.delayed(_handed)(number, one) for number, one in enumerate(runs))
    except BaseException:
        close()
        raise


def _handed(number: int, one: Run) -> _Done:
    """A run in the hands of a thread of the process that has the workers, or of a cluster's worker."""
    own = _workers.get(os.getpid())
    return own.compute(number, one) if own else _computed(number, one)


def _in_turn(number: int, one: Run) -> _Done:
    """A run in this process."""
    with slot():
        return _computed(number, one)


def _cluster() -> "joblib.parallel.ParallelBackendBase | None":
    """What `joblib.parallel_config` has set around this call."""
    backend = joblib.parallel.get_active_backend(prefer="threads")[0]
    return None if getattr(backend, "supports_sharedmem", False) else backend


def _computed(number: int, one: Run) -> _Done:
    """The run, with one thread."""
    before, begun, threads = clock.spent(), (time.perf_counter(), time.process_time()), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        value = one.function(**one.settings)
    finally:
        torch.set_num_threads(threads)
    here = {kind: seconds - before.get(kind, 0) for kind, seconds in clock.spent().items()}
    seconds, processor = time.perf_counter() - begun[0], time.process_time() - begun[1]
    return _Done(number, value, seconds, processor, spent=here, process=os.getpid())


def _begin(parent: int) -> None:
    """In a new worker: an interrupt is its parent's to answer, and it does not outlive its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _left(seconds: Sequence[float], total: int, jobs: int) -> str:
    """How long the rest takes, by the runs measured; those found finished took next to nothing and do not count."""
    counted = [s for s in seconds if s > max(seconds) / 10]
    left = (total - len(seconds)) * sum(counted) / len(counted) / jobs if counted else 0
    return f"about {int(left) // 60}:{int(left) % 60:02d} left"
