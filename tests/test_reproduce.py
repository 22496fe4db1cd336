"""The runner, the command line and the paper's builder, on tiny repositories made for the purpose."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jupytext
import nbformat
import pytest

from wdat import cli, paper, records
from wdat import reproduce as runner
from wdat.reproduce import CellFailed, reproduce

HEAD = """# %% [markdown]
# # A title

# %% tags=["parameters"]
n = 1  # images
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import json, os, sys
from pathlib import Path
root = Path.cwd().parent
out, work = root / out, root / work
"""


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A repository of two notebooks; the second reads what the first wrote."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "wdat"\n')
    (tmp_path / "notebooks" / "profiles" / "digits.yaml").write_text("common: {n: 2}\n")
    notebook(tmp_path, "01_first", "(out / 'a.json').write_text(json.dumps({'n': n}))")
    notebook(tmp_path, "02_second", "(out / 'b.json').write_text((out / 'a.json').read_text())")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def notebook(root: Path, name: str, *cells: str, head: str = HEAD) -> Path:
    path = root / "notebooks" / f"{name}.py"
    path.write_text(head + "".join(f"\n# %%\n{cell}\n" for cell in cells))
    return path


@pytest.fixture
def pretend(monkeypatch):
    """Notebooks that only pretend to run: each writes the files that `writes` names for it, with that content."""
    writes = {"01_first": {"figures/digits/a.json": "1"}, "02_second": {"figures/digits/b.json": "1"}}

    def execute(source, executed, passed, scratch, kernel, root):
        for path, content in writes[source.stem].items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content)
        code = jupytext.read(source)
        records.write_file(executed, runner._tidy(code, root))

    monkeypatch.setattr(runner, "_execute", execute)
    return writes


def said(capsys) -> str:
    return capsys.readouterr().out


# Real kernels


def test_notebooks_run_in_this_interpreter_without_ports_and_leave_no_trace_of_the_machine(repo, monkeypatch, capsys):
    home = repo / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    look = """from ipykernel.connect import get_connection_info
print(root, sys.prefix)
found = {"n": n, "python": sys.executable, "threads": os.environ["OMP_NUM_THREADS"], "folder": os.getcwd()}
found |= {"transport": json.loads(get_connection_info())["transport"], "command": os.environ["WDAT_COMMAND"]}
(out / "a.json").write_text(json.dumps(found))"""
    source = notebook(repo, "01_first", look)
    assert reproduce() == ["01_first", "02_second"]
    log = said(capsys)
    assert log.startswith("device: ")
    assert "[1/2] 01_first … (not run yet)" in log and "[2/2] 02_second done in 0:0" in log
    assert json.loads((repo / "figures/digits/b.json").read_text()) == {
        "n": 2,
        "python": sys.executable,
        "threads": "1",
        "folder": str(repo / "notebooks"),
        "transport": "ipc",
        "command": "wdat reproduce --profile digits --only 01",
    }
    assert not list(home.iterdir())
    text = source.with_suffix(".ipynb").read_text()
    assert str(repo) not in text and sys.prefix not in text and "papermill" not in text
    executed = nbformat.reads(text, as_version=4)
    nbformat.validate(executed)
    ran = [
        c.source
        for c in executed.cells
        if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])
    ]
    assert ran == [c.source for c in jupytext.read(source).cells if c.cell_type == "code"]

    assert reproduce() == []
    assert said(capsys).count(": up to date") == 2


def test_a_failing_cell_is_two_lines_and_exit_code_1(repo, capsys):
    notebook(repo, "02_second", "print('so far')", "x = 1\ny = x / (x - n + 1)\nz = 3")
    assert cli.main(["reproduce"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2
    assert (
        error[0]
        == "wdat: 02_second failed in cell [5], line 2 `y = x / (x - n + 1)`: ZeroDivisionError: division by zero"
    )
    assert ".wdat/digits/notebooks/02_second.partial.ipynb" in error[1]
    partial = (repo / ".wdat/digits/notebooks/02_second.partial.ipynb").read_text()
    assert "so far" in partial and "ZeroDivisionError" in partial
    assert not (repo / "notebooks/02_second.ipynb").exists()
    assert cli.main(["reproduce", "-P", "n=1"]) == 0  # the parameter changes both
    assert not (repo / ".wdat/digits/notebooks/02_second.partial.ipynb").exists()


def test_a_dead_kernel_is_reported_as_such(repo):
    notebook(repo, "01_first", "os.kill(os.getpid(), 9)")
    with pytest.raises(
        CellFailed, match=r"01_first stopped with its kernel .*out of memory\?\)\nas far as it ran: .wdat"
    ):
        reproduce(only=["1"])


def test_a_killed_run_resumes_after_the_last_finished_notebook(repo, capsys):
    wait = """import time
(work / "started").write_text(str(os.getpid()))
while not (root / "go").exists():
    time.sleep(0.05)"""
    notebook(repo, "02_second", wait)
    process = subprocess.Popen([sys.executable, "-m", "wdat.cli", "reproduce"], stdout=subprocess.DEVNULL)
    started = repo / ".wdat/digits/made/started"
    deadline = time.monotonic() + 60
    while not (started.exists() and started.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(OSError, match=rf"profile digits is being run already \(process {process.pid}\)"):
        reproduce()
    process.send_signal(signal.SIGKILL)
    process.wait()
    kernel = Path("/proc") / started.read_text()
    while kernel.exists() and time.monotonic() < deadline:  # it notices within seconds that its parent is gone
        time.sleep(0.1)
    assert not kernel.exists()
    (repo / "go").touch()
    assert reproduce() == ["02_second"]
    log = said(capsys)
    assert "01_first: up to date" in log and "02_second … (not finished)" in log and "removed" not in log


# What makes a notebook run again


def test_every_rerun_says_why(repo, pretend, capsys, monkeypatch):
    def again(why: str, ran: list[str], **arguments) -> None:
        assert reproduce(**arguments) == ran
        assert why in said(capsys)

    first, profile = repo / "notebooks/01_first.py", repo / "notebooks/profiles/digits.yaml"
    again("[1/2] 01_first … (not run yet)", ["01_first", "02_second"])
    again("[2/2] 02_second: up to date", [])
    again("(forced)", ["02_second"], only=["02"], force=True)
    profile.write_text("common: {n: 2}\n01_first: {n: 3}\n")
    again("01_first … (parameters changed (n: 2 → 3))", ["01_first"])
    again("parameters changed (n: 3 → 4)", ["01_first", "02_second"], parameters={"n": 4})
    reproduce()
    first.write_text(first.read_text() + "\nprint()\n")
    again("01_first … (code changed)", ["01_first"])
    (repo / "figures/digits/a.json").unlink()
    again("01_first … (output missing: figures/digits/a.json)", ["01_first"])
    (repo / "figures/digits/b.json").write_text("by hand")
    again("02_second … (output changed: figures/digits/b.json)", ["02_second"])
    (repo / "requirements.lock.txt").write_text("torch==0\n")
    again("requirements.lock.txt changed", ["01_first", "02_second"])
    pretend["01_first"]["figures/digits/a.json"] = "2"
    again("01_first … (forced)", ["01_first"], only=["01"], force=True)
    again("02_second … (earlier results changed: figures/digits/a.json)", ["02_second"])
    notebook(repo, "01_first", "from wdat import records", head=HEAD)
    reproduce()
    library = runner.library
    monkeypatch.setattr(runner, "library", lambda code: {k: "new" for k in library(code) if "records" in k})
    again("01_first … (library changed: wdat/__init__.py, wdat/records.py)", ["01_first"])


def test_changed_prose_keeps_the_outputs(repo, capsys):
    reproduce(only=["01"])
    source = repo / "notebooks/01_first.py"
    before = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    source.write_text(source.read_text().replace("A title", "A better title"))
    assert reproduce(only=["01"]) == []
    assert "01_first … (text changed)" in said(capsys)
    after = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert after.cells[0].source == "# A better title"
    assert after.cells[1:] == before.cells[1:]
    assert reproduce(only=["01"]) == []
    assert ": up to date" in said(capsys)


def test_what_only_the_provenance_of_a_record_says_changes_nothing_downstream(repo, pretend, capsys):
    record = {"results": 1, "provenance": {"date": "today"}}
    pretend["01_first"]["figures/digits/a.json"] = json.dumps(record)
    reproduce()
    pretend["01_first"]["figures/digits/a.json"] = json.dumps(record | {"provenance": {"date": "tomorrow"}})
    assert reproduce(only=["01"], force=True) == ["01_first"]
    assert reproduce() == []
    pretend["01_first"]["figures/digits/a.json"] = json.dumps(record | {"results": 2})
    assert reproduce(only=["01"], force=True) == ["01_first"]
    assert reproduce() == ["02_second"]
    assert "earlier results changed: figures/digits/a.json" in said(capsys)


def test_files_of_other_conditions_are_removed_and_those_of_a_resumed_run_kept(repo, pretend, capsys, monkeypatch):
    network, figure = repo / ".wdat/digits/made/network.pt", repo / "figures/digits/a-old.pdf"
    files = dict(pretend["01_first"])
    pretend["01_first"] |= {".wdat/digits/made/network.pt": "weights", "figures/digits/a-old.pdf": "drawn"}
    reproduce()
    pretend["01_first"] = files  # from now on the network would be found, and not trained again
    (repo / "figures/digits/a.json").unlink()
    assert reproduce() == ["01_first"] and network.exists() and figure.exists()
    library = runner.library
    monkeypatch.setattr(runner, "library", lambda code: library(code) | {"wdat/plots.py": "new"})
    assert reproduce(only=["1"]) == ["01_first"] and network.exists()  # drawing changes no network
    said(capsys)
    assert reproduce(parameters={"n": 7}, only=["1"]) == ["01_first"]
    assert "removed 1 outdated file(s) from .wdat/digits/made\n" in said(capsys)
    assert not network.exists() and not figure.exists()
    assert (repo / "figures/digits/b.json").exists() and (repo / "figures/digits/a.json").exists()


def test_files_of_a_run_cut_short_stay_with_their_notebook(repo, pretend, monkeypatch):
    checkpoint, execute = repo / ".wdat/digits/made/checkpoint.pt", runner._execute

    def cut(*_) -> None:
        checkpoint.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_execute", cut)
    with pytest.raises(KeyboardInterrupt):
        reproduce(only=["01"])
    monkeypatch.setattr(runner, "_execute", execute)
    reproduce(only=["02"], force=True)
    assert checkpoint.exists()  # not the second notebook's to remove
    monkeypatch.setattr(
        runner, "_execute", lambda *a: execute(*a) if checkpoint.exists() else pytest.fail("no checkpoint")
    )
    assert reproduce(only=["01"]) == ["01_first"]  # resumed
    monkeypatch.setattr(runner, "_execute", execute)
    assert reproduce(only=["01"], parameters={"n": 7}) == ["01_first"]
    assert not checkpoint.exists()


def test_the_library_of_a_notebook_is_what_its_imports_reach(tmp_path, monkeypatch):
    package = tmp_path / "wdat"
    package.mkdir()
    sources = {
        "__init__": '"""Doc."""\n',
        "low": "x = 1\n",
        "high": "from wdat.low import x\n",
        "lazy": "def f():\n    import wdat.low\n    return wdat.low.x\n",
        "apart": "y = 2\n",
    }
    for name, text in sources.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(runner, "__file__", str(package / "reproduce.py"))

    def modules(code: str) -> set[str]:
        return {Path(name).stem for name in runner.library(code)}

    assert modules("import math") == set()
    assert modules("from wdat import high") == modules("import wdat.high as h") == {"__init__", "high", "low"}
    assert modules("%matplotlib inline\nfrom wdat.lazy import f") == {"__init__", "lazy", "low"}
    assert modules("import wdat") == modules("from wdat import evaluate") == set(sources)
    before = runner.library("from wdat import high")
    (package / "low.py").write_text('"""Now with a docstring."""\n# and a comment\nx  =  1\n')
    assert runner.library("from wdat import high") == before
    (package / "low.py").write_text("x = 2\n")
    assert {k for k, v in runner.library("from wdat import high").items() if v != before[k]} == {"wdat/low.py"}


# Refusals, all before anything runs


@pytest.mark.parametrize(
    ("arguments", "profile", "sentence"),
    [
        ({"profile": "cifra10"}, None, "profile 'cifra10' is unknown; notebooks/profiles has: digits"),
        ({"only": ["03"]}, None, "notebook '03' is unknown; there are: 01_first, 02_second"),
        ({"parameters": {"m": 1}}, None, "parameter 'm' in the command is unknown; known: n, out, work"),
        ({}, "common: {m: 1}", "parameter 'm' in the common section is unknown; known: n, out, work"),
        ({}, "02_second: {epochs: 1}", "parameter 'epochs' in the section 02_second is unknown; known: n, out, work"),
        ({"parameters": {"n": [1]}}, None, r"parameter 01_first: n is \[1\], but its default is 1"),
        ({}, "02_secnd: {n: 1}", "has '02_secnd'; its sections are: common, threads, 01_first, 02_second"),
        ({}, "[1, 2]", "has no mapping; its sections are"),
        ({}, "a: b: c", "digits.yaml is not YAML"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(repo, arguments, profile, sentence):
    if profile:
        (repo / "notebooks/profiles/digits.yaml").write_text(profile)
    with pytest.raises(ValueError, match=sentence):
        reproduce(**arguments)
    assert not (repo / ".wdat").exists()


def test_only_what_a_notebook_declares_is_passed(repo, pretend, monkeypatch):
    notebook(repo, "02_second", "pass", head='# %% tags=["parameters"]\nlr = 0.1\nsizes = [\n    1,\n    2,\n]\n')
    (repo / "notebooks/profiles/digits.yaml").write_text("common: {n: 5}\n02_second: {lr: 1e-3}\n")
    passed, execute = {}, runner._execute
    monkeypatch.setattr(
        runner, "_execute", lambda s, e, p, *rest: passed.update({s.stem: p}) or execute(s, e, p, *rest)
    )
    reproduce(parameters={"sizes": [3]})
    assert passed["01_first"] == {"n": 5, "out": "figures/digits", "work": ".wdat/digits/made"}
    assert passed["02_second"] == {"lr": 0.001, "sizes": [3]}


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ('# %% tags=["parameters"]\nn = len([1])\n', r"`n = len\(\[1\]\)` in the parameters cell is no plain literal"),
        ('# %% tags=["parameters"]\nimport os\n', "`import os` in the parameters cell is no plain literal"),
        ("# %%\nn = 1\n", "has 0 cells tagged parameters"),
        ('# %% tags=["parameters"]\nn = 1\n# %% tags=["parameters"]\nm = 1\n', "has 2 cells tagged parameters"),
    ],
)
def test_a_parameters_cell_holds_literals(repo, cells, sentence):
    with pytest.raises(ValueError, match=sentence):
        runner.declared(notebook(repo, "01_first", head=cells))


@pytest.mark.parametrize("blocked", [".wdat", "figures"])
def test_an_unwritable_output_is_said_before_starting(repo, pretend, blocked, capsys):
    (repo / blocked).write_text("a file where a folder must be")
    assert cli.main(["reproduce"]) == 2
    captured = capsys.readouterr()
    assert f"wdat: cannot write to {repo / blocked}" in captured.err and captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_a_broken_state_file_means_starting_afresh(repo, pretend, capsys):
    reproduce()
    (repo / ".wdat/digits/state.json").write_text("{")
    assert reproduce() == ["01_first", "02_second"]
    assert "cannot be read; starting afresh" in said(capsys)


def test_the_lock_is_let_go(repo, pretend):
    reproduce()
    with (repo / ".wdat/digits/lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_other_profiles_leave_the_committed_notebooks_alone(repo, pretend):
    (repo / "notebooks/profiles/zoo.yaml").touch()
    reproduce("zoo")
    assert not list((repo / "notebooks").glob("*.ipynb"))
    assert (repo / ".wdat/zoo/notebooks/01_first.ipynb").is_file()


# Words on the screen


def test_progress_bars_are_relayed_now_and_then():
    stream = io.StringIO()
    relay = runner._relay(stream, every=0)
    relay.write("plain\n\nlines\n")
    relay.write("\r 10%|#  | 1/10\r 20%|## | 2/10")
    assert stream.getvalue() == "    plain\n    lines\n    20%|## | 2/10\n"
    runner._relay(stream, every=1e9).write("\r 30%|###| 3/10")
    assert "30%" not in stream.getvalue()


def test_an_executed_copy_keeps_outputs_but_no_bars_and_paths(tmp_path):
    cell = nbformat.v4.new_code_cell("f()", metadata={"papermill": {"start_time": "now"}, "tags": []})
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="100%|####| 5/5 [00:01<00:00,  4.2it/s]\n"),
        nbformat.v4.new_output("stream", name="stderr", text=f"/tmp/ipykernel_12/3.py:1: UserWarning: {tmp_path}/x\n"),
        nbformat.v4.new_output("stream", name="stdout", text="50% | kept\n"),
    ]
    text = runner._tidy(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    found = nbformat.reads(text, as_version=4).cells[0]
    assert [o.text for o in found.outputs] == ["<cell>:1: UserWarning: x\n", "50% | kept\n"]
    assert found.metadata == {} and found.id == "cell-00"


# The command


def test_help_and_version_are_quick_and_need_nothing_heavy():
    code = "import sys\nfrom wdat import cli\ntry: cli.main(['reproduce', '--help'])\nfinally: print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--profile" in found
    assert not {"torch", "papermill", "matplotlib", "numpy"} & set(found.split())


def test_usage(capsys):
    for arguments, words in [
        (["nonsense"], "invalid choice"),
        (["reproduce", "-P", "n"], "not of the form name=value"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith("wdat ")


def test_errors_are_lines_and_bugs_keep_their_traceback(repo, capsys, monkeypatch):
    assert cli.main(["reproduce", "--profile", "none"]) == 2
    assert capsys.readouterr().err == "wdat: profile 'none' is unknown; notebooks/profiles has: digits\n"
    monkeypatch.setenv("WDAT_DEBUG", "1")
    with pytest.raises(ValueError, match="profile 'none'"):
        cli.main(["reproduce", "--profile", "none"])
    monkeypatch.delenv("WDAT_DEBUG")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "reproduce", stop)
    assert cli.main(["reproduce"]) == 130
    monkeypatch.setattr(runner, "reproduce", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["reproduce"])
    monkeypatch.chdir("/")
    assert cli.main(["paper"]) == 2
    assert "is not inside a wdat repository" in capsys.readouterr().err


# The paper

TEX = r"""\documentclass{article}
\usepackage{graphicx}
\begin{document}
\today\ \input{../figures/digits/table} \includegraphics[width=1cm]{../figures/digits/dot.png}\ref{here}\label{here}
\end{document}
"""
needs_latex = pytest.mark.skipif(
    not (shutil.which("latexmk") and shutil.which("pdflatex")), reason="latexmk is not installed"
)


@pytest.fixture
def article(repo, monkeypatch):
    import base64

    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    (repo / "paper").mkdir()
    (repo / "figures" / "digits").mkdir(parents=True)
    (repo / "paper" / "main.tex").write_text(TEX)
    (repo / "figures" / "digits" / "table.tex").write_text("a table\n")
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
    (repo / "figures" / "digits" / "dot.png").write_bytes(base64.b64decode(dot))
    (repo / "CITATION.cff").write_text("date-released: 2026-02-03\n")
    return repo


@needs_latex
def test_the_paper_is_built_the_same_twice_and_packed_for_arxiv(article, capsys):
    assert cli.main(["paper", "--arxiv"]) == 0
    assert capsys.readouterr().out == "paper/wdat.pdf\npaper/build/arxiv.tar.gz\n"
    first = (article / "paper/wdat.pdf").read_bytes()
    assert first.startswith(b"%PDF") and b"D:20260203" in first
    with tarfile.open(article / "paper/build/arxiv.tar.gz") as archive:
        assert archive.getnames() == ["figures-digits-dot.png", "figures-digits-table.tex", "main.tex"]
        text = archive.extractfile("main.tex").read().decode()
    assert r"\input{figures-digits-table.tex}" in text and "../" not in text
    shutil.rmtree(article / "paper/build")
    assert paper.build(article).read_bytes() == first


@needs_latex
@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (r"\today", r"\nonsense", r"^main.tex:4: Undefined control sequence"),
        (r"\ref{here}", r"\ref{there}", r"^main.tex: undefined reference or citation: there$"),
        (
            r"digits/table",
            r"digits/tabel",
            r"^main.tex:4: \S*tabel\S* is missing\nfigures and tables are made by: wdat",
        ),
        (r"{graphicx}", r"{graphiix}", r"^main.tex:3: graphiix.sty is missing\non Debian: apt-get install latexmk"),
    ],
)
def test_a_latex_error_is_file_line_and_remedy_and_leaves_the_old_pdf(article, old, new, sentence, capsys):
    (article / "paper/wdat.pdf").write_text("old")
    (article / "paper/main.tex").write_text(TEX.replace(old, new))
    with pytest.raises(paper.PaperFailed, match=sentence):
        paper.build(article)
    assert (article / "paper/wdat.pdf").read_text() == "old"
    assert cli.main(["paper"]) == 1
    assert capsys.readouterr().err.startswith("wdat: main.tex:")


def test_a_missing_tool_or_source_is_named(article, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"latexmk is not installed.*\non Debian: apt-get install latexmk"):
        paper.build(article)
    (article / "paper/main.tex").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*main\.tex"):
        paper.build(article)


def test_the_date_of_the_paper(article, monkeypatch):
    assert paper._epoch(article) == "1770076800"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "7")
    assert paper._epoch(article) == "7"
    assert os.environ["SOURCE_DATE_EPOCH"] == "7"
