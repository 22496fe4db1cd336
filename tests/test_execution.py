"""One notebook in a kernel of its own, and the copy of it that is committed."""

import json
import sys

import jupytext
import nbformat
import pytest
from repository import notebook, said

from wdat import cli
from wdat.reproduce import execution
from wdat.reproduce.runner import reproduce
from wdat.reproduce.screen import Screen


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
        execution.CellFailed, match=r"01_first stopped with its kernel .*out of memory\?\)\nas far as it ran: .wdat"
    ):
        reproduce(only=["1"])


def test_changed_prose_and_looks_keep_the_outputs(repo, capsys):
    reproduce(only=["01"])
    source = repo / "notebooks/01_first.py"
    before = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    text = source.read_text().replace("A title", "A better title").replace("os, sys", "os, sys  # tools")
    source.write_text(text + "\n# %% [markdown]\n# The end.\n")
    assert reproduce(only=["01"]) == []
    assert "01_first … (text changed)" in said(capsys)
    after = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert after.cells[0].source == "# A better title"
    assert after.cells[-1].source == "The end." and [c for c in after.cells if "# tools" in c.source]
    code = [[c | {"source": ""} for c in n.cells if c.cell_type == "code"] for n in (before, after)]
    assert code[0] == code[1]
    assert reproduce(only=["01"]) == []
    assert ": up to date" in said(capsys)


def test_an_executed_copy_keeps_outputs_but_no_bars_and_paths(tmp_path):
    cell = nbformat.v4.new_code_cell("f()", metadata={"papermill": {"start_time": "now"}, "tags": []})
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="100%|####| 5/5 [00:01<00:00,  4.2it/s]\n"),
        nbformat.v4.new_output("stream", name="stderr", text=f"/tmp/ipykernel_12/3.py:1: UserWarning: {tmp_path}/x\n"),
        nbformat.v4.new_output("stream", name="stdout", text="50% | kept\n"),
    ]
    text = execution.tidy(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    found = nbformat.reads(text, as_version=4).cells[0]
    assert [o.text for o in found.outputs] == ["<cell>:1: UserWarning: x\n", "50% | kept\n"]
    assert found.metadata == {} and found.id == "cell-00"


def test_progress_bars_are_relayed_now_and_then_in_one_line(capsys):
    one, other = (often := Screen(every=0)).of("01"), often.of("02")
    one.write("plain\n\nlines\n")
    one.write("\r 10%|#  | 1/10\r 20%|## | 2/10")
    other.write("\rruns: 1 of 3 runs")
    one.write("\r")
    said = capsys.readouterr().out
    assert said.startswith("    01  plain\n    01  lines\n    01  20%|## | 2/10\n")
    assert said.endswith("    01  20%|## | 2/10 | 02  runs: 1 of 3 runs\n    02  runs: 1 of 3 runs\n")
    Screen(every=1e9).of("01").write("\r 30%|###| 3/10")
    assert "30%" not in capsys.readouterr().out
