"""Learning-rate schedules as pure functions of (progress, epochs, base): no state, so a resumed run can not drift.

`progress` is the number of epochs done, a float in [0, epochs); `base` the learning rate the schedule scales.
"""

import math
from collections.abc import Callable

Schedule = Callable[[float, int, float], float]


def constant(progress: float, epochs: int, base: float) -> float:
    """base throughout."""
    return base


def step(progress: float, epochs: int, base: float) -> float:
    """base, a tenth of it after half of the epochs, a hundredth after three quarters."""
    return base * 0.1 ** ((progress >= epochs / 2) + (progress >= 3 * epochs / 4))


def cosine(progress: float, epochs: int, base: float) -> float:
    """Half a cosine from base to 0, continuous in progress."""
    return base * 0.5 * (1 + math.cos(math.pi * progress / epochs))


def slow_start_fast_decay(progress: float, epochs: int, base: float) -> float:
    """Linear ramp over the first half of the epochs, then halved every epoch; constant within an epoch.

    With H = epochs // 2: base * (e + 1) for e < H, the peak H * base at e = H - 1, then H * base * 2^-(e - H + 1).
    `base` is the first epoch's rate, not the peak. Source: Jeddi, Shafiee and Wong, arXiv 2012.13628.
    """
    e, half = int(progress), max(1, epochs // 2)
    return base * (e + 1) if e < half else base * half * 0.5 ** (e - half + 1)


def geometric_start_fast_decay(progress: float, epochs: int, base: float) -> float:
    """The same but for the ramp, which doubles every epoch up to the same peak: the authors do not say which is theirs.

    With H = epochs // 2: H * base * 2^-(H - 1 - e) for e < H.
    """
    e, half = int(progress), max(1, epochs // 2)
    return base * half * 0.5 ** (half - 1 - e) if e < half else slow_start_fast_decay(progress, epochs, base)


def fast_start_slow_decay(progress: float, epochs: int, base: float) -> float:
    """`slow_start_fast_decay` with its epochs in reverse order: the same rates, what their order is worth."""
    return slow_start_fast_decay(epochs - 1 - int(progress), epochs, base)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "step": step,
    "cosine": cosine,
    "slow-start-fast-decay": slow_start_fast_decay,
    "geometric-start-fast-decay": geometric_start_fast_decay,
    "fast-start-slow-decay": fast_start_slow_decay,
}


def get_schedule(schedule: str | Schedule) -> Schedule:
    """A schedule by name, or the callable itself. ValueError lists the names."""
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule]
