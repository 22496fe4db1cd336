"""What a machine does to a run: a full disk, a folder that is read only, a second run beside it, a clock that jumps.

The commands are those of `kills`, compared with undisturbed runs in the same way. Writing fails by the system's own
limit on the size of a file (RLIMIT_FSIZE: EFBIG instead of ENOSPC, at any byte one likes) and, where the system lets us
mount one, on a full file system; a folder is made unwritable by a file that stands in its place.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.trials import kills

LIMITS = (0, 100, 2_000, 5_000, 12_000, 30_000)  # bytes that a file may have


def _limited(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with an error instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _jumping(years: float) -> None:
    """Clocks that jump back and forth by so many years at every look."""
    real, real_ns, looks = time.time, time.time_ns, iter(range(10**9))
    by = int(years * 365 * 86400)
    time.time = lambda: real() + by * (-1) ** next(looks)
    time.time_ns = lambda: real_ns() + 10**9 * by * (-1) ** next(looks)


def _ended(folder: Path, work: str, before: Callable[[], None] | None = None) -> int:
    return kills.finished(kills.started(folder, kills.WORK[work], before))


@contextlib.contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A file system of this size there; False where none may be mounted."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        if sys.platform == "linux" and subprocess.run(words, capture_output=True).returncode == 0:
            try:
                yield True
            finally:
                subprocess.run(["umount", "-l", str(folder)], check=True)
            return
    yield False


def trial(work: str, folder: Path, limits: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every fault on one kind of work: exit codes, and whether what there is is whole and right."""
    expected_code = _ended(kills.place(folder / "undisturbed"), work)
    expected = kills.results(folder / "undisturbed")
    rows = []

    def judged(fault: str, own: Path, codes: list[int], refused: bool) -> None:
        """The codes must be 3 (files) where it is to be refused; then one more run must give the same."""
        found = kills.results(own)
        wrong = [name for name, value in found.items() if expected.get(name) != value]
        row = {"work": work, "fault": fault, "codes": codes, "unreadable": kills.unreadable(own), "wrong": wrong}
        row["as_expected"] = all(code == 3 for code in codes) if refused else all(code == 0 for code in codes)
        again = _ended(own, work)
        rows.append(row | {"same_afterwards": again == expected_code == 0 and kills.results(own) == expected})

    for limit in limits:
        own = kills.place(folder / "limited")
        code = _ended(own, work, lambda limit=limit: _limited(limit))
        judged(f"files of at most {limit:,} bytes", own, [code], refused=code != 0)
    with _small_disk(folder / "small", "300k") as mounted:
        if mounted:
            own = kills.place(folder / "small" / "disk")
            fill = own / "fill"
            with contextlib.suppress(OSError), fill.open("wb") as file:
                while True:
                    file.write(b"\0" * 512)
            code = _ended(own, work)
            fill.unlink(missing_ok=True)
            kept = kills.place(folder / "moved")
            subprocess.run(["cp", "-a", f"{own}/.", str(kept)], check=True)
            judged("a full disk", kept, [code], refused=True)
    for name, before in (("a clock that jumps by a year", 1.0), ("a clock that jumps by thirty years", 30.0)):
        own = kills.place(folder / "clock")
        judged(name, own, [_ended(own, work, lambda years=before: _jumping(years))], refused=False)
        for path in own.rglob("*"):
            os.utime(path, (2**31 - 2, 2**31 - 2))  # files of the future, to go on from
        judged(f"{name}, files of 2038", own, [_ended(own, work)], refused=False)
    own = kills.place(folder / "two")
    both = [kills.started(own, kills.WORK[work]) for _ in range(2)]
    judged("two runs in one folder", own, [kills.finished(process) for process in both], refused=False)
    return rows


def run(folder: Path, quick: bool) -> dict[str, Any]:
    """Fine-tuning and evaluation; quick: few limits on fine-tuning alone."""
    kills.imported()
    works, limits = ("fine-tuning",) if quick else ("fine-tuning", "evaluation"), LIMITS[:3] if quick else LIMITS
    return {"faults": [row for work in works for row in trial(work, folder / work, limits)]}
