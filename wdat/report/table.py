"""A table of ready strings, as HTML (notebooks), Markdown (README) and LaTeX (paper), written beside its record."""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wdat import records
from wdat.report.recorded import of_record

SYMBOLS = {
    r"W\_∞": r"$W_\infty$", "W₂": r"$W_2$", r"A\_δ": r"$A_\delta$", "±": r"$\pm$", "δ": r"$\delta$", "β": r"$\beta$",
    "Υ": r"$\Upsilon$", "∞": r"$\infty$", "ε": r"$\varepsilon$", "τ": r"$\tau$", " > ": r" $>$ ", "%": r"\%", "–": "--",
    "≤": r"$\le$", "−": r"$-$", "σ": r"$\sigma$", "→": r"$\to$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table of ready strings with its caption; shows itself in a notebook."""

    frame: pd.DataFrame
    caption: str

    def _rows(self) -> list[list[str]]:
        return [[str(v) for v in row] for row in self.frame.itertuples(index=False)]

    def _numeric(self) -> list[bool]:
        """Which columns hold numbers, to be set flush right."""
        columns = zip(*self._rows(), strict=True) if len(self.frame) else [[]] * self.frame.shape[1]
        return [all(re.match(r"[\d.−+-]|–$", v) for v in column) for column in columns]

    def markdown(self) -> str:
        """A Markdown table."""
        head = [str(c) for c in self.frame.columns]
        rule = ["---:" if numeric else "---" for numeric in self._numeric()]
        return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *self._rows()]) + "\n"

    def latex(self) -> str:
        """A booktabs tabular: numbers to the right, long headings on several lines, a repeated first cell but once."""
        kinds = ["r" if numeric else "l" for numeric in self._numeric()]
        lines = [rf"\begin{{tabular}}{{@{{}}{''.join(kinds)}@{{}}}}", r"\toprule"]
        lines += [" & ".join(_heading(str(c)) for c in self.frame.columns) + r" \\", r"\midrule"]
        grouped, last = bool(self.frame.iloc[:, 0].duplicated().any()), None
        for row in self._rows():
            if grouped and last not in (None, row[0]):
                lines.append(r"\addlinespace")
            lines.append(" & ".join(tex(v) for v in ["" if row[0] == last else row[0], *row[1:]]) + r" \\")
            last = row[0]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def _repr_html_(self) -> str:
        if self.frame.empty:
            return f"<p>{html.escape(self.caption)}</p>\n<p>The record has nothing of this.</p>"
        sides = ["right" if numeric else "left" for numeric in self._numeric()]
        width = {"th": "", "td": "; white-space: nowrap"}
        lines = [[(c, "th") for c in map(str, self.frame.columns)], *([(v, "td") for v in row] for row in self._rows())]
        rows = [
            "".join(
                f'<{tag} style="text-align: {side}{width[tag]}">{html.escape(text)}</{tag}>'
                for (text, tag), side in zip(line, sides, strict=True)
            )
            for line in lines
        ]
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        return f"<p>{html.escape(self.caption)}</p>\n<table>\n{body}\n</table>"


def tex(text: str) -> str:
    """Plain text with the symbols of tables as LaTeX."""
    text = text.replace("_", r"\_")
    for plain, latex in SYMBOLS.items():
        text = text.replace(plain, latex)
    return text


def _heading(text: str) -> str:
    """A radius and what is in brackets go on lines of their own."""
    lines = [tex(line) for line in re.split(r" (?=\(|[\d./]+(?: \(|$))", text)]
    return r"\shortstack{" + r"\\".join(lines) + "}" if len(lines) > 1 else lines[0]


def _save(made: "Table | tuple[list[dict[str, str]], str]", stem: Path) -> Table:
    """NAME.md and NAME.tex; nothing for a table without rows. A column that a row lacks has – there."""
    table = made if isinstance(made, Table) else Table(pd.DataFrame(made[0]).fillna("–"), made[1])
    if not table.frame.empty:
        records.write_file(stem.with_name(stem.name + ".md"), table.markdown())
        records.write_file(
            stem.with_name(stem.name + ".tex"), f"% generated from the record beside it\n{table.latex()}"
        )
    return table


def tabled(kind: str, suffix: str = "") -> Callable:
    """Makes a function of a record's results, which returns rows {column: text} and a caption, one of the path.

    It returns a `Table`, of which NAME.md and NAME.tex are written: see `of_record`.
    """
    return of_record(kind, suffix, _save)
