"""What every figure shares: one style, how it shows itself, and the way from a record to PDF and PNG beside it.

Colours are told apart by the colour-blind, and by marker or dash in black and white. Figures are as wide as the paper's
text, so that their letters are printed at the size given here.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from wdat import records
from wdat.report.recorded import of_record

PAGE = 6.5  # inches, the width of the paper's text
GREY, BLUE, ORANGE, GREEN, PINK = "#8c8c8c", "#0173b2", "#de8f05", "#029e73", "#cc78bc"
COLOURS = (BLUE, ORANGE, GREEN, "#d55e00", PINK, "#56b4e9", "#ca9161", "#222222")  # seaborn's "colorblind", reordered
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)))
SYMBOLS = "os^Dvp<>"
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7.5, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "figure.titlesize": 8, "legend.title_fontsize": 7.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "xtick.major.size": 3,
    "ytick.major.size": 3, "xtick.major.width": 0.8, "ytick.major.width": 0.8, "lines.linewidth": 1.3,
    "lines.markersize": 4, "pdf.fonttype": 42, "savefig.dpi": 180,
}  # fmt: skip


class Drawing(Figure):
    """A figure that shows itself in a notebook as a PNG, whatever matplotlib's backend is.

    It is not pyplot's: nothing has to be closed, and nothing is shown twice.
    """

    panels: Sequence[Axes] = ()  # those that share what is written at the outer edges

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        return buffer.getvalue()


def canvas(rows: int, columns: int, height: float, width: float = PAGE, **settings) -> tuple[Drawing, np.ndarray]:
    """A figure of panels, (rows, columns) axes; `width` of the whole and `height` of one row in inches."""
    figure = Drawing(figsize=(width, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        sns.set_theme(style="ticks", rc=STYLE)
        yield


def _save(figure: Drawing, stem: Path) -> Drawing:
    """PDF and PNG without dates, so that the same record gives the same bytes."""
    for form, metadata in (("pdf", {"CreationDate": None, "ModDate": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata=metadata)
        records.write_file(stem.with_name(f"{stem.name}.{form}"), buffer.getvalue())
    return figure


def drawn(kind: str, suffix: str = "") -> Callable:
    """Makes a function of a record's results, which returns a figure, one of the record's path: see `of_record`."""
    return of_record(kind, suffix, _save, _style)


def look(number: int, line: bool = True, marks: bool = True) -> dict:
    """Colour, dash and marker of the number-th of several curves: no two alike in colour, nor in black and white."""
    shown = {"color": COLOURS[number % len(COLOURS)]}
    shown["linestyle"] = DASHES[number % len(DASHES)] if line else "none"
    return shown | ({"marker": SYMBOLS[number % len(SYMBOLS)]} if marks else {})


def legend_below(figure: Figure, columns: int = 6, **settings) -> None:
    """One legend under all panels, with what any of them labels; `panels` are labelled at the outer edges alone."""
    outer_labels(getattr(figure, "panels", ()))
    shown: dict[str, object] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    if shown:
        settings = {"ncols": min(columns, len(shown))} | settings
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", **settings)


def panels(count: int, columns: int, height: float, **settings) -> tuple[Drawing, list[Axes]]:
    """`count` panels in rows of at most `columns`; the room of those missing in the last row stays empty."""
    columns = min(columns, count)
    figure, axes = canvas(-(-count // columns), columns, height, width=PAGE if columns > 1 else 0.7 * PAGE, **settings)
    for axis in axes.ravel()[count:]:
        axis.remove()
    figure.panels = list(axes.ravel()[:count])
    return figure, figure.panels


def outer_labels(axes: Sequence[Axes]) -> None:
    """Of panels in rows: y labels in the first column, x labels where no panel lies below."""
    for place, axis in enumerate(axes):
        columns = axis.get_subplotspec().get_gridspec().ncols
        below = place + columns < len(axes)
        axis.tick_params(labelbottom=not below or not axis.get_shared_x_axes().joined(axis, axes[-1]))
        if below:
            axis.set_xlabel("")
        if place % columns:
            axis.set_ylabel("")


def plain_log(axis: Axis, ticks: list[float] | None = None) -> None:
    """Plain numbers on a logarithmic axis: at these ticks, or at 1, 2 and 5 times the powers of ten."""
    axis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def points(values: object) -> np.ndarray:
    """Fractions as percentages."""
    return 100 * np.asarray(values, dtype=float)


def order(p: float | str) -> str:
    """A Wasserstein order in a title."""
    return r"$\infty$" if float(p) == float("inf") else f"{float(p):g}"


def norm(r: float | str) -> str:
    """A pixel norm in a title."""
    return r"$\ell_\infty$" if float(r) == float("inf") else rf"$\ell_{float(r):g}$"


def short(name: str) -> str:
    """A network's name in a title."""
    return name.replace("cifar_", "").replace("_", " ")
