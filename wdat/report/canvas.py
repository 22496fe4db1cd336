"""What every figure shares: one style, how it shows itself, and the way from a record to PDF and PNG beside it.

Figures are as wide as the paper's text, so that their letters are printed at the size given here.
"""

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdat import records
from wdat.report.recorded import of_record

PAGE = 6.5  # inches, the width of the paper's text
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


def drawn(
    kind: str, suffix: str = "", legend: int = 6, *, each: str | Callable[[dict], Sequence] = "", columns: int = 3,
    height: float = 2.0, below: float = 0.0, title: str | None = None, **shared: bool | str,
) -> Callable:  # fmt: skip
    """Makes a function of a record's results, which returns a figure, one of the record's path: see `of_record`.

    each: what gets a panel each, a list of the results by its name or a function of them; then the function draws one
    of these, `make(axis, thing, found, ...)`, `columns` of them in a row, each `height` inches high, `shared` as in
    `panels`. All that is labelled is in one legend below, of at most `legend` columns and, from two on, as many as
    there are panels, with this `title`; a high one needs `below` inches more.
    """

    def wrap(make: Callable) -> Callable:
        @functools.wraps(make)
        def figure_of(found: dict, *arguments, **settings) -> Drawing:
            if not each:
                figure = make(found, *arguments, **settings)
                legend_below(figure, legend, title=title)
                return figure
            things = found[each] if isinstance(each, str) else each(found)
            figure, axes = panels(len(things), columns, height, **shared)
            for axis, thing in zip(axes, things, strict=True):
                make(axis, thing, found, *arguments, **settings)
            legend_below(figure, min(legend, max(2, len(axes))), title=title)
            figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + below)
            return figure

        return of_record(kind, suffix, _save, _style)(figure_of)

    return wrap


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
