"""Colours, marks and dashes of curves, their axes and the words of titles: what figures have in common.

Colours are told apart by the colour-blind, and by marker or dash in black and white.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

GREY, BLUE, ORANGE, GREEN, PINK = "#8c8c8c", "#0173b2", "#de8f05", "#029e73", "#cc78bc"
COLOURS = (BLUE, ORANGE, GREEN, "#d55e00", PINK, "#56b4e9", "#ca9161", "#222222")  # seaborn's "colorblind", reordered
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)))
SYMBOLS = "os^Dvp<>"


def look(number: int, line: bool = True, marks: bool = True) -> dict:
    """Colour, dash and marker of the number-th of several curves: no two alike in colour, nor in black and white."""
    shown = {"color": COLOURS[number % len(COLOURS)]}
    shown["linestyle"] = DASHES[number % len(DASHES)] if line else "none"
    return shown | ({"marker": SYMBOLS[number % len(SYMBOLS)]} if marks else {})


def plain_log(axis: Axis, ticks: list[float] | None = None) -> None:
    """Plain numbers on a logarithmic axis: at these ticks, or at 1, 2 and 5 times the powers of ten."""
    axis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def points(values: object) -> np.ndarray:
    """Fractions as percentages."""
    return 100 * np.asarray(values, dtype=float)


def over_radius(rows: Sequence[dict], key: str) -> tuple[list[float], np.ndarray]:
    """The radii of rows that have threats, and a fraction of each as a percentage."""
    return [row["threat"]["delta"] for row in rows], points([row[key] for row in rows])


def name_ticks(axis: Axes, names: Sequence[str], turned: int = 60) -> None:
    """Names of classes along x, turned by so many degrees unless all are short."""
    turn = {} if max(map(len, names)) < 3 else {"rotation": turned, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(names)), names, **turn)
    if turn:
        for label in axis.get_xticklabels():
            label.set_verticalalignment("center")  # the end of a name stands below its tick


def order(p: float | str) -> str:
    """A Wasserstein order in a title."""
    return r"$\infty$" if float(p) == float("inf") else f"{float(p):g}"


def norm(r: float | str) -> str:
    """A pixel norm in a title."""
    return r"$\ell_\infty$" if float(r) == float("inf") else rf"$\ell_{float(r):g}$"


def short(name: str) -> str:
    """A network's name in a title."""
    return name.replace("cifar_", "").replace("_", " ")
