"""Records: what is written is what is read, whole or not at all, and every refusal is a sentence."""

import dataclasses
import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wdat import records
from wdat.threats.ball import Threat

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(results=trees)
def test_what_is_written_is_what_is_read(tmp_path_factory, results):
    path = tmp_path_factory.mktemp("records") / "a" / "b.json"
    record = records.read(records.write(path, "anything", results), "anything")
    assert record["results"] == results


def test_numbers_of_a_list_share_a_line(tmp_path):
    results = {"curve": list(range(500)), "images": [[[1, 2], [None, True]]], "odd": ["[\n 1,\n 2\n]", []]}
    path = records.write(tmp_path / "r.json", "k", results)
    assert records.read(path)["results"] == results
    assert len(path.read_text().split('"provenance"')[0].splitlines()) < 30


def test_floats_keep_every_bit(tmp_path):
    values = [*torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist(), 5e-324, 1e308]
    assert records.read(records.write(tmp_path / "r.json", "k", values))["results"] == values


def test_arrays_tensors_dataclasses_and_paths_become_plain(tmp_path):
    @dataclasses.dataclass
    class Found:
        accuracy: torch.Tensor
        radii: np.ndarray

    results = {
        "found": Found(torch.tensor(0.5, requires_grad=True), np.arange(3)),
        "bf16": torch.tensor([0.25], dtype=torch.bfloat16),
        "flag": np.bool_(True),
        8: np.float32(0.5),
        "pair": (1, range(2)),
    }
    record = records.read(records.write(tmp_path / "r.json", "k", results, Threat("8/255"), where=tmp_path / "w.pt"))
    assert record["results"] == {
        "found": {"accuracy": 0.5, "radii": [0, 1, 2]},
        "bf16": [0.25],
        "flag": True,
        "8": 0.5,
        "pair": [1, [0, 1]],
    }
    assert record["config"] == {"delta": 8 / 255, "p": 2.0, "r": "inf", "written": "8/255"}
    assert Threat(**record["config"]) == Threat("8/255")
    assert record["where"] == "w.pt"  # no machine's folders in a record


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_non_numbers_are_refused_with_their_key(tmp_path, bad):
    with pytest.raises(ValueError, match=r"results\.curve\[1\]\.accuracy is -?(nan|inf)"):
        records.write(tmp_path / "r.json", "k", {"curve": [{"accuracy": 1.0}, {"accuracy": bad}]})
    with pytest.raises(ValueError, match=r"results\[1\] is"):
        records.write(tmp_path / "r.json", "k", torch.tensor([0.0, float(bad)]))
    assert not list(tmp_path.iterdir())


def test_infinity_is_a_setting_but_nan_is_not(tmp_path):
    record = records.read(records.write(tmp_path / "r.json", "k", {"p": "inf"}, {"p": math.inf}, row=-math.inf))
    assert (record["config"]["p"], record["results"]["p"], record["row"]) == ("inf", "inf", "-inf")
    with pytest.raises(ValueError, match=r"config\.p is nan"):
        records.write(tmp_path / "r.json", "k", {}, {"p": math.nan})


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        ({"model": torch.nn.Linear}, r"results\.model is a type"),
        ({"a": {1, 2}}, r"results\.a is a set"),
        ({1: 0, "1": 0}, r"results has a key .* read the same"),
        ({None: 0}, r"results has a key that is no text"),
    ],
)
def test_what_a_record_cannot_hold(tmp_path, results, sentence):
    with pytest.raises(ValueError, match=sentence):
        records.write(tmp_path / "r.json", "k", results)


def test_reserved_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match="already has the key 'provenance'"):
        records.write(tmp_path / "r.json", "k", {}, provenance={})


def test_a_failed_write_leaves_the_old_record_and_no_litter(tmp_path, monkeypatch):
    path = records.write(tmp_path / "r.json", "k", 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*r\.json: No space left on device; free some space"):
        records.write(path, "k", 2)
    assert records.read(path)["results"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_what_a_killed_process_was_writing_goes_with_the_next_write(tmp_path):
    code = "import os, sys; os.replace = lambda *_: os.kill(os.getpid(), 9); from wdat import records"
    code += "; records.write_file(sys.argv[1], 'half')"
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "r.json"], cwd=Path(__file__).parents[1]).returncode
    (killed,) = tmp_path.iterdir()
    assert ended == -9 and killed.read_text() == "half" and killed.name.startswith(".r.json.")
    parent = re.sub(r"\d+\.part", f"{os.getppid()}.part", killed.name)  # that of a process which lives
    (tmp_path / parent).write_text("at work")
    records.write_file(tmp_path / "other.json", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [parent, "other.json"]


def test_an_unwritable_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/sub/r\.json: Not a directory"):
        records.write(tmp_path / "file" / "sub" / "r.json", "k", 1)


def test_reading_says_what_is_wrong_and_what_makes_the_record(tmp_path):
    folder = tmp_path / "figures" / "zoo"
    with pytest.raises(
        FileNotFoundError, match=r"there is no record .*a\.json; make it with: wdat reproduce --profile zoo"
    ):
        records.read(folder / "a.json")
    folder.mkdir(parents=True)
    for content, sentence in [
        (b"<html>", "is not a JSON record"),
        (b"\xff\xfe", "is not a JSON record"),
        (b"[1]", "is JSON but no record"),
        (b'{"kind": "k", "results": 1, "schema": 0}', "has schema 0, this wdat reads 1"),
    ]:
        (folder / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            records.read(folder / "a.json")
    records.write(folder / "a.json", "curve", 1)
    with pytest.raises(ValueError, match="of kind 'curve', not 'table'"):
        records.read(folder / "a.json", "table")


def test_provenance_says_where_a_record_comes_from(monkeypatch):
    monkeypatch.setenv("WDAT_COMMAND", "wdat reproduce --profile smoke")
    found = records.provenance()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["command"] == "wdat reproduce --profile smoke"
    assert found["date"].endswith("Z")
    assert found["seconds"] >= 0
    assert (found["no_cuda"] is None) == torch.cuda.is_available()
    assert found["git"]["commit"] is None or len(found["git"]["commit"]) == 40
    assert json.dumps(found, allow_nan=False)


def test_seconds_are_those_of_the_run(monkeypatch):
    """A session that imported the library an hour ago, in which a run of five seconds begins, and then another."""
    now = [3600.0]
    monkeypatch.setattr(records.time, "perf_counter", lambda: now[0])
    for begin in (records.started, records.device_line):
        begin()
        now[0] += 5.04
        assert records.provenance("cpu")["seconds"] == 5
        now[0] += 600


def test_outside_git_the_commit_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "wdat" / "records.py"))
    assert records.provenance()["git"] == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", "")
    assert records.provenance()["git"] == {"commit": None, "dirty": None}


def test_devices():
    assert records.pick_device("cpu") == torch.device("cpu")
    assert records.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert records.device_line("cpu").startswith("device: cpu (")
    with pytest.raises(ValueError, match="device 'gpu' is unknown; write auto, cpu, cuda"):
        records.pick_device("gpu")
    with pytest.raises(ValueError, match=r"device cuda:99 (cannot be used here: .+; use device auto|does not exist)"):
        records.pick_device("cuda:99")
    if not torch.cuda.is_available():
        assert "no CUDA: " in records.device_line()


def test_the_repository_is_found_from_below(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "wdat"\n')
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "pyproject.toml").write_text('[project]\nname = "other"\n')
    monkeypatch.chdir(tmp_path / "notebooks")
    assert records.root() == tmp_path
    monkeypatch.chdir("/")
    with pytest.raises(FileNotFoundError, match="/ is not inside a wdat repository"):
        records.root()


def test_reading_and_writing_files_needs_no_torch():
    code = "import sys, wdat.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
