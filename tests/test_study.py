"""A notebook's study: what it loads, what it records, and that nothing is computed when it shows records."""

import pytest

from wdat import records
from wdat.studies.notebook import Study


def never(*_, **__):
    raise AssertionError("computed although shown from records")


def count(data, factor):
    return {"n": factor * len(data)}


def test_what_is_measured_is_recorded_and_shown_again_without_computing(tmp_path, capsys):
    out, work = str(tmp_path / "figures" / "digits"), str(tmp_path / "made")
    study = Study(out, work, data="digits", n_test=12)
    path = study.record("01_count", "count", count, study.test, factor=2, config={"a": 1}, seeds=[3])
    record = records.read(path, "count")
    assert record["results"] == {"n": 24} and record["config"] == {"a": 1} and record["seeds"] == [3]
    assert record["provenance"]["device"] and "device:" in capsys.readouterr().out

    again = Study(out, work, True, data="digits", networks=["nowhere.yaml"], train_root="nowhere")
    before = path.read_bytes()
    assert again.record("01_count", "count", never, again.test, again.networks, again.first, again.last) == path
    assert path.read_bytes() == before and (again.train, again.test, again.networks) == (None, None, {})
    assert "nothing is computed" in capsys.readouterr().out


def test_a_record_that_is_not_there_is_not_made_up(tmp_path):
    study = Study(str(tmp_path / "figures" / "zoo"), str(tmp_path), from_records=True, data="digits")
    with pytest.raises(FileNotFoundError, match="wdat reproduce --profile zoo"):
        study.record("01_count", "count", never)
    records.write(tmp_path / "figures" / "zoo" / "01_count.json", "other", {})
    with pytest.raises(ValueError, match="kind 'other', not 'count'"):
        study.record("01_count", "count", never)
