"""What the cells of an executed notebook must show."""

import base64

import nbformat

FIGURES = ("figures.", "report.certified_curves(", "report.density(", "report.kernel(")
TABLES = ("tables.", "report.certified(", "report.tickets(")


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
            assert [data for data in shown if "<table>" in data.get("text/html", "")], source
            seen += 1
        assert not [o for o in cell.get("outputs", []) if o.output_type == "stream" and "/s]" in o.text], source
    return seen
