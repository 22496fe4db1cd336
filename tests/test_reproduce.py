"""The runner, the command line and the paper's builder, on tiny repositories made for the purpose."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
from repository import assert_they_end, notebook, said

from wdat import cli
from wdat.reproduce import execution, paper, profiles, runner
from wdat.reproduce.runner import reproduce


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_interrupt_ends_every_worker_within_two_seconds(repo):
    sleep = f"""from wdat.studies.jobs import Run, run_all
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_jobs import sleep_and_mark
run_all([Run(str(k), sleep_and_mark, {{"seconds": 300, "mark": work / str(k)}}) for k in range(3)], 2)"""
    notebook(repo, "01_first", sleep)
    words = [sys.executable, "-m", "wdat.cli", "reproduce"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    marks = [repo / f".wdat/digits/made/{k}.pid" for k in range(2)]
    deadline = time.monotonic() + 120
    while not all(mark.exists() and mark.read_text() for mark in marks):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    kernel = next(p for p in below if "ipykernel_launcher" in p.cmdline())
    workers = [psutil.Process(int(mark.read_text())) for mark in marks]
    assert set(workers) <= set(below)
    os.kill(process.pid, signal.SIGINT)
    assert_they_end(workers)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and error == "wdat: interrupted; run the same command again to resume\n"
    assert not psutil.wait_procs(below, timeout=20)[1]
    assert not list(Path("/dev/shm").glob(f"*loky-{kernel.pid}-*"))


def test_files_of_a_run_cut_short_stay_with_their_notebook(repo, pretend, monkeypatch):
    checkpoint, execute = repo / ".wdat/digits/made/checkpoint.pt", execution.execute

    def cut(*_) -> None:
        checkpoint.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "execute", cut)
    with pytest.raises(KeyboardInterrupt):
        reproduce(only=["01"])
    monkeypatch.setattr(execution, "execute", execute)
    reproduce(only=["02"], force=True)
    assert checkpoint.exists()  # not the second notebook's to remove
    monkeypatch.setattr(
        execution, "execute", lambda *a: execute(*a) if checkpoint.exists() else pytest.fail("no checkpoint")
    )
    assert reproduce(only=["01"]) == ["01_first"]  # resumed
    monkeypatch.setattr(execution, "execute", execute)
    assert reproduce(only=["01"], parameters={"n": 7}) == ["01_first"]
    assert not checkpoint.exists()


# Refusals, all before anything runs


@pytest.mark.parametrize(
    ("arguments", "profile", "sentence"),
    [
        ({"profile": "cifra10"}, None, "profile 'cifra10' is unknown; notebooks/profiles has: digits"),
        ({"only": ["03"]}, None, "notebook '03' is unknown; there are: 01_first, 02_second"),
        ({"parameters": {"m": 1}}, None, "'m' of the command; known: n, out, work"),
        ({}, "common: {m: 1}", "'m' of the section common; known: n, out, work"),
        ({}, "02_second: {epochs: 1}", "'epochs' of the section 02_second; known: n, out, work"),
        ({"parameters": {"n": [1]}}, None, r"01_first: n is \[1\]; expected a whole number"),
        ({}, "02_secnd: {n: 1}", "has '02_secnd'; its sections are: common, jobs, 01_first, 02_second"),
        ({"jobs": -1}, None, "jobs=-1 must be 0"),
        ({}, "[1, 2]", "has no mapping; its sections are"),
        ({}, "a: b: c", "digits.yaml is not YAML"),
        ({}, "jobs: 1.5", r"digits.yaml: jobs is 1.5; expected a whole number"),
        ({}, "jobs: true", r"digits.yaml: jobs is True; expected a whole number"),
        ({}, "common: 3", r"digits.yaml: common is 3; expected a mapping"),
        ({}, "common: {n: 1.5}", "01_first: n is 1.5; expected a whole number"),
        ({"parameters": {"n": True}}, None, "01_first: n is True; expected a whole number"),
        ({"parameters": {"n": "2/16"}}, None, "01_first: n is '2/16'; expected a whole number"),
        ({"parameters": {"outt": 1}}, None, "'outt' of the command; did you mean out"),
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
    passed, execute = {}, execution.execute
    monkeypatch.setattr(
        execution, "execute", lambda s, e, p, *rest: passed.update({s.stem: p}) or execute(s, e, p, *rest)
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
        profiles.declared(notebook(repo, "01_first", head=cells))


@pytest.mark.parametrize("blocked", [".wdat", "figures"])
def test_an_unwritable_output_is_said_before_starting(repo, pretend, blocked, capsys):
    (repo / blocked).write_text("a file where a folder must be")
    assert cli.main(["reproduce"]) == 3
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
    assert (repo / "figures/zoo/01_first.ipynb").is_file()


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
