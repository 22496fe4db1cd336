"""Networks as they were, after W-TRADES and behind noise, in one record; what it shows."""

import pytest
from nets import images, labels, relu

import wdat
from wdat import records
from wdat.report import randomised as report
from wdat.studies.randomisation import randomised
from wdat.zoo.data import from_tensors


def test_what_is_left_by_attack_and_what_is_proved(tmp_path):
    model, x = relu(), images(48)
    data = from_tensors(x, labels(model, x, 3), classes=list("abcd"))
    threats = [wdat.Threat("1/8", 2, 2), wdat.Threat("1/2", 2, 2), wdat.Threat("1/32", 2, "inf")]
    found = randomised(
        {"small": model}, data.at(list(range(24))), data.at(list(range(24, 48))), threats, tmp_path / "work",
        sigmas=[0.1, 0.3], recipe={"objective": {"kind": "plain"}, "epochs": 2, "lr": 0.05}, search={"steps": 3},
        draws=100, curve=7,
    )  # fmt: skip
    first, second = found["networks"]
    assert first["before"] == second["before"] and first["tuned"] == second["tuned"] != first["before"]
    for left in (first["before"], first["tuned"]):
        near, far, _ = (row["upper"] for row in left["threats"])
        assert 0 <= far <= near <= left["clean"] <= 1
    path = records.write(tmp_path / "11.json", "randomised", found)
    (axis,) = report.proved(path).axes
    squares, circles, line, triangles = (artist.get_xydata() for artist in axis.get_lines())
    assert squares[:, 1].tolist() == pytest.approx(
        [100 * first["before"]["clean"], *(100 * row["upper"] for row in first["before"]["threats"][:2])]
    )
    assert circles[0, 1] == pytest.approx(100 * first["tuned"]["clean"]) and len(line) == 7
    best = [100 * max(network["threats"][k]["lower"] for network in found["networks"]) for k in range(2)]
    assert triangles[:, 1].tolist() == pytest.approx(best)
    for network in found["networks"]:
        network.pop("tuned")  # a record from before it was measured
    (axis,) = report.proved(records.write(tmp_path / "12.json", "randomised", found)).axes
    assert len(axis.get_lines()) == 3
