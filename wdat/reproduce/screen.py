"""What notebooks that run at the same time print: lines as they come, their progress bars in one line for all."""

import sys
import threading
import time
from types import SimpleNamespace


class Screen:
    """Lines of the runner and of its notebooks; of each notebook's bar the last state, in a log only now and then."""

    def __init__(self, every: float = 20.0) -> None:
        self.every, self.last, self.bars, self.lock = every, time.monotonic(), {}, threading.Lock()

    def say(self, *lines: str) -> None:
        """Print whole lines."""
        live = sys.stdout.isatty()
        with self.lock:
            sys.stdout.write("".join(("\r\033[K" if live else "") + f"{line}\n" for line in lines))
            if live:
                self._draw()
            sys.stdout.flush()

    def of(self, number: str) -> SimpleNamespace:
        """A file for what the notebook of this number prints."""

        def write(text: str) -> None:
            if "\r" not in text:
                self.say(*(f"    {number}  {line}" for line in text.splitlines() if line.strip()))
                return
            with self.lock:
                self.bars[number] = text.rstrip().split("\r")[-1].strip()
                if sys.stdout.isatty():
                    sys.stdout.write("\r\033[K")
                    self._draw()
                elif any(self.bars.values()) and time.monotonic() - self.last > self.every:
                    self.last = time.monotonic()
                    self._draw("\n")
                sys.stdout.flush()

        return SimpleNamespace(write=write, flush=sys.stdout.flush)

    def _draw(self, end: str = "") -> None:
        bars = " | ".join(f"{number}  {bar}" for number, bar in sorted(self.bars.items()) if bar)
        sys.stdout.write(f"    {bars}{end}" if bars else "")
