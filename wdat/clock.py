"""Where the time goes: seconds by kind of work, in this process and in the workers it waited for. No torch.

Beside the kinds of work: "lists", how long lists of runs took; "runs", what all of them had of a core; "longest", of
each list the longest run; "waiting", for workers to start. They say what more cores would gain (`benchmarks.timing`).
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_seconds: Counter[str] = Counter()
_most = [1]  # runs at the same time
_inside = [0.0]  # of every open `spending`, outermost first: seconds that ones within it have counted


@contextmanager
def spending(kind: str) -> Iterator[None]:
    """Seconds spent inside count as `kind`, without those that a `spending` within counts as its own."""
    start = time.perf_counter()
    _inside.append(0.0)
    try:
        yield
    finally:
        whole = time.perf_counter() - start
        _seconds[kind] += whole - _inside.pop()
        _inside[-1] += whole


def add(seconds: dict[str, float], jobs: int = 1) -> None:
    """Count what was spent elsewhere, by so many workers at the same time."""
    _seconds.update(seconds)
    _most[0] = max(_most[0], jobs)


def jobs() -> int:
    """The most runs that were computed at the same time."""
    return _most[0]


def spent() -> dict[str, float]:
    """Seconds by kind so far; those of workers are added up, so they may exceed the time that passed."""
    return {kind: round(seconds, 3) for kind, seconds in _seconds.items()}
