"""What the cells of an executed notebook must show."""

import ast
import base64
from pathlib import Path

import nbformat

import wdat


def decorated(name: str) -> set[str]:
    """Functions of `wdat.report` that this decorator makes a figure or a table of."""
    found = set()
    for path in (Path(wdat.__file__).parent / "report").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found |= {node.name for d in node.decorator_list if ast.unparse(d).startswith(f"{name}(")}
    return found


FIGURES = ("figures.", *(f"report.{name}(" for name in decorated("drawn")))
TABLES = ("tables.", *(f"report.{name}(" for name in decorated("tabled")))


def check_outputs(executed: nbformat.NotebookNode) -> int:
    """Assert that every cell that draws has one PNG below 300 kB, every table HTML; no bars are left. Cells checked."""
    seen = 0
    for cell in executed.cells:
        source = cell.source.lstrip()
        shown = [output.get("data", {}) for output in cell.get("outputs", [])]
        if cell.cell_type == "code" and source.startswith(FIGURES):
            pictures = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
            assert len(pictures) == 1, f"{source}: {len(pictures)} pictures"
            assert pictures[0].startswith(b"\x89PNG") and 2_000 < len(pictures[0]) < 300_000, source
            seen += 1
        elif cell.cell_type == "code" and source.startswith(TABLES):
            pages = [data.get("text/html", "") for data in shown]
            assert [page for page in pages if "<table>" in page or "The record has nothing of this" in page], source
            seen += 1
        assert not [o for o in cell.get("outputs", []) if o.output_type == "stream" and "/s]" in o.text], source
    return seen
