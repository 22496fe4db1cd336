"""Build paper/wdat.pdf from paper/main.tex and the generated figures and tables, and the archive for arXiv.

Dates come from SOURCE_DATE_EPOCH, or else from `date-released` in CITATION.cff, so that the same sources give the
same PDF.
"""

import gzip
import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from wdat import records

DEBIAN = "latexmk texlive-latex-recommended texlive-fonts-recommended texlive-latex-extra texlive-science lmodern"


class PaperFailed(Exception):
    """LaTeX stopped; the message has its errors as file:line: what."""


def build(root: str | Path) -> Path:
    """Run latexmk on paper/main.tex in paper/build, put the PDF in place as paper/wdat.pdf; returns its path.

    FileNotFoundError if the source or a tool is missing (and which packages have it); `PaperFailed` with file and
    line if LaTeX stops, or if a reference or citation stays undefined. The old PDF is untouched by a failure.
    """
    return records.write_file(Path(root) / "paper" / "wdat.pdf", made(root))


def made(root: str | Path) -> bytes:
    """The PDF as `build` would write it."""
    paper = Path(root) / "paper"
    _latexmk(paper, Path(root))
    return (paper / "build" / "main.pdf").read_bytes()


def arxiv(root: str | Path) -> Path:
    """Pack what `build` read into the flat paper/build/arxiv.tar.gz, check that it compiles alone; returns its path.

    main.tex, main.bbl, every \\input table and every figure lie side by side, named after their folders.
    """
    root = Path(root).resolve()
    build(root)
    paper, made = root / "paper", root / "paper" / "build"
    read = [
        line.removeprefix("INPUT ") for line in (made / "main.fls").read_text().splitlines() if line[:6] == "INPUT "
    ]
    paths = {(paper / name).resolve() for name in read}
    local = [path for path in sorted(paths) if path.is_relative_to(root) and not path.is_relative_to(made)]
    flat = {path: "-".join(path.relative_to(paper if path.is_relative_to(paper) else root).parts) for path in local}
    files = {
        name: _flattened(path, flat) if path.suffix == ".tex" else path.read_bytes() for path, name in flat.items()
    }
    if (made / "main.bbl").is_file():
        files["main.bbl"] = (made / "main.bbl").read_bytes()
        files = {name: content for name, content in files.items() if not name.endswith(".bib")}
    if leaking := [name for name, content in files.items() if name.endswith(".tex") and str(root).encode() in content]:
        raise PaperFailed(f"{leaking[0]} names the folder {root}; write paths relative to paper/")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        _latexmk(Path(folder), root, "-bibtex-")
    return records.write_file(made / "arxiv.tar.gz", _archive(files, int(_epoch(root))))


def _latexmk(folder: Path, root: Path, *options: str) -> None:
    if not (folder / "main.tex").is_file():
        raise FileNotFoundError(f"there is no {folder / 'main.tex'}; the paper's source belongs there")
    for tool in ("latexmk", "pdflatex"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed; it builds the PDF\non Debian: apt-get install {DEBIAN}")
    settings = {
        "SOURCE_DATE_EPOCH": _epoch(root),
        "FORCE_SOURCE_DATE": "1",  # \today too
        "max_print_line": "10000",  # TeX breaks its log's lines at 79 characters otherwise
    }
    words = ["latexmk", "-norc", "-pdf", "-recorder", "-interaction=nonstopmode", "-halt-on-error", "-file-line-error"]
    words += ["-g", "-outdir=build", *options, "main.tex"]  # -g: judge this run's log, not an old one
    ran = subprocess.run(
        words, cwd=folder, env=os.environ | settings, stdin=subprocess.DEVNULL, capture_output=True, errors="replace"
    )
    log = folder / "build" / "main.log"
    said = log.read_text(errors="replace") if log.is_file() else ran.stdout + ran.stderr
    if ran.returncode:
        raise PaperFailed(_errors(said) or _errors(ran.stdout) or f"latexmk failed: {(ran.stdout + ran.stderr)[-400:]}")
    if undefined := sorted(set(re.findall(r"(?:Reference|Citation) [`']([^']+)' .*undefined", said))):
        raise PaperFailed(f"main.tex: undefined reference or citation: {', '.join(undefined)}")


def _errors(log: str) -> str:
    """Up to three lines file:line: what, and what to do about a missing file."""
    found = []
    for match in re.finditer(r"^(?:\./)?([^\s:]+:\d+): (.*)\n(?:.*\n){0,3}?(?:l\.\d+ (.*))?", log, re.MULTILINE):
        if "==>" not in match[2] and "Emergency stop" not in match[2]:
            found.append(f"{match[1]}: {match[2]}" + (f" … {match[3].strip()[-60:]}" if match[3] else ""))
    found = list(dict.fromkeys(found))[:3]
    if missing := re.search(r"File [`']([^']+)' not found", log):
        stop = re.search(r"^(?:\./)?([^\s:]+:\d+): (?:Emergency stop|.*not found)", log, re.MULTILINE)
        package = missing[1].endswith((".sty", ".cls", ".def", ".fd"))
        remedy = f"on Debian: apt-get install {DEBIAN}" if package else "figures and tables are made by: wdat reproduce"
        found = [f"{stop[1] if stop else 'main.tex'}: {missing[1]} is missing", remedy]
    return "\n".join(found)


def _flattened(source: Path, flat: dict[Path, str]) -> bytes:
    """The text of a source with the files it names replaced by their flat names."""

    def rename(match: re.Match[str]) -> str:
        wanted = re.sub(r"^(\.{1,2}/)+", "", match[2].strip())
        for path, name in flat.items():
            if any(f"/{path.as_posix()}".endswith(f"/{wanted}{ending}") for ending in ("", ".tex", ".pdf", ".png")):
                return f"{match[1]}{{{name}}}"
        return match[0]

    named = r"(\\(?:input|include|includegraphics)\s*(?:\[[^\]]*\])?)\{([^{}]+)\}"
    return re.sub(named, rename, source.read_text(encoding="utf-8")).encode()


def _archive(files: dict[str, bytes], date: int) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", fileobj=buffer, mtime=date) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), date
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _epoch(root: Path) -> str:
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    citation = root / "CITATION.cff"
    released = re.search(
        r"^date-released: *['\"]?(\d{4}-\d\d-\d\d)", citation.read_text() if citation.is_file() else "", re.M
    )
    date = datetime.fromisoformat(released[1]) if released else datetime(2025, 1, 1)
    return str(int(date.replace(tzinfo=UTC).timestamp()))
