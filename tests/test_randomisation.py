"""Networks as they were, fine-tuned and behind noise: one record, what is chosen and aimed at, what it shows."""

import copy

import pytest
from nets import images, labels, relu

import wdat
from wdat import records
from wdat.report import randomised as report
from wdat.report.companions import COMPANIONS
from wdat.studies.randomisation import randomised
from wdat.zoo.data import from_tensors

THREATS = [wdat.Threat("1/8", 2, 2), wdat.Threat("1/2", 2, 2), wdat.Threat("1/32", 2, "inf")]
PLAIN = {"objective": {"kind": "plain"}, "epochs": 2, "lr": 0.05}
GIVEN = {
    "sigmas": [0.1, 0.3], "draws": [100, 200], "recipe": PLAIN, "search": {"steps": 3}, "validation": 0.25, "curve": 7,
    "tunings": {"W-TRADES": {**PLAIN, "objective": {"kind": "w-trades", "delta": "1/8", "r": 2, "steps": 2}},
                "PGD-AT": {**PLAIN, "objective": {"kind": "at", "delta": "1/8", "r": 2, "steps": 2}}},
    "aims": {"clean": -3, "W_2 l2 1/8": 10, "W_2 linf 1/32": -100},
}  # fmt: skip


def run(work, **changed):
    model, x = relu(), images(48)
    data = from_tensors(x, labels(model, x, 3), classes=list("abcd"))
    sets = data.at(list(range(24))), data.at(list(range(24, 48)))
    return randomised({"small": model, "same": relu()}, *sets, THREATS, work, **{**GIVEN, **changed})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(tmp_path_factory.mktemp("noise"))


def test_what_is_left_by_attack_and_what_is_proved(found):
    assert [n["network"] for n in found["networks"]] == ["small", "small", "same", "same"]
    assert [(n["sigma"], n["draws"]) for n in found["networks"]] == [(0.1, 100), (0.3, 200)] * 2
    first, second, *_ = found["networks"]
    assert first["before"] == second["before"] and first["tunings"] == second["tunings"]
    assert list(first["tunings"]) == ["W-TRADES", "PGD-AT"]
    curves = [first["before"], *first["tunings"].values()]
    assert all(one != other for k, one in enumerate(curves) for other in curves[:k])
    for left in curves:
        near, far, _ = (row["upper"] for row in left["threats"])
        assert 0 <= far <= near <= left["clean"] <= 1


def test_sigma_is_chosen_on_images_that_were_not_trained_on(found, tmp_path, monkeypatch):
    first, second, *_ = found["networks"]
    assert first["validation"]["n"] == 6
    for number, threat in enumerate(THREATS):
        sigmas = {c["network"]: c["sigma"] for c in found["chosen"] if c["threat"] == threat.describe()}
        best = max((first, second), key=lambda row, k=number: row["validation"]["plug_in"][k])
        assert sigmas["small"] == best["sigma"]
    sets = []
    monkeypatch.setattr(
        "wdat.studies.randomisation.trained",
        lambda *_, train, validation, **__: (
            sets.append((train, validation))
            or ({"validation": {"accuracy": 0.5, "plug_in": [0.1] * len(THREATS)}}, None)
        ),
    )
    run(tmp_path)
    assert len(sets) == 4
    for train, held in sets:
        assert len(train) == 18 and len(held) == 6
        assert not any((image == other).all() for image in held.pixels for other in train.pixels)
    alone = run(tmp_path, sigmas=[0.3], draws=[200], tunings={})
    assert len(sets) == 4 and {choice["sigma"] for choice in alone["chosen"]} == {0.3}
    assert "validation" not in alone["networks"][0] and alone["networks"][0]["before"] == first["before"]
    assert all(row["of"] == report.AS_IT_WAS for row in report.margins(alone)[0]["threats"])


def test_margins_are_against_the_best_that_attack_leaves(found):
    small, _ = report.margins(found)
    for number, row in enumerate(small["threats"]):
        own = next(n for n in found["networks"] if (n["network"], n["sigma"]) == ("small", row["sigma"]))
        left = [c["threats"][number]["upper"] for c in (own["before"], *own["tunings"].values())]
        assert row["left"] == max(left) and row["gain"] == own["threats"][number]["lower"] - max(left)
        aim = (10, None, -100)[number]
        assert row["met"] == (None if aim is None else 100 * row["gain"] >= aim)
    assert [row["met"] for row in (small["threats"][1], small["threats"][2])] == [None, True]
    changes = [n["accuracy"] - n["before"]["clean"] for n in found["networks"] if n["network"] == "small"
               and n["sigma"] in {small["threats"][k]["sigma"] for k in (0, 2)}]  # fmt: skip
    assert small["change"] == min(changes) and small["kept"] == (100 * small["change"] >= -3)


def test_a_missed_aim_is_said(found, tmp_path):
    high = copy.deepcopy(found)
    high["aims"]["threats"] = [1000, None, -100]
    table = report.certified_aims(records.write(tmp_path / "11.json", "randomised", high)).frame
    assert table.columns.tolist() == ["network", "σ", "clean", "l2 1/8", "l∞ 1/32"]
    assert table["l2 1/8"].str.contains("†").all() and not table["l∞ 1/32"].str.contains("†").any()
    said = COMPANIONS["randomised"](high)
    assert said["l2.1/8.met"] == "0 of 2" and said["linf.1/32.met"] == "2 of 2" and said["l2.1/8.aim"] == "+1000"
    kept = sum(row["kept"] for row in report.margins(high))
    assert said["clean.met"] == f"{kept} of 2" and said["aims.met"] == f"{2 + kept} of 6"
    high["aims"] = {"clean": None, "threats": [None, None, None]}
    table = report.certified_aims(records.write(tmp_path / "none.json", "randomised", high))
    assert len(table.frame.columns) == 3 + len(THREATS) and "†" not in table.markdown()
    assert "l2.1/8.met" not in COMPANIONS["randomised"](high)


def test_the_record_is_shown(found, tmp_path):
    first, second, *_ = found["networks"]
    path = records.write(tmp_path / "11.json", "randomised", found)
    axis, _ = report.proved(path).axes
    *left, line, triangles = (artist.get_xydata() for artist in axis.get_lines())
    for marks, curve in zip(left, (first["before"], *first["tunings"].values()), strict=True):
        expected = [100 * curve["clean"], *(100 * row["upper"] for row in curve["threats"][:2])]
        assert marks[:, 1].tolist() == pytest.approx(expected)
    best = [100 * max(network["threats"][k]["lower"] for network in (first, second)) for k in range(2)]
    assert triangles[:, 1].tolist() == pytest.approx(best) and len(line) == 7
    shown = report.certified(path).frame
    assert "PGD-AT (upper)" in shown and shown["σ"].str.endswith("*").sum() == 6
    for key in ("chosen", "aims"):
        found = {k: v for k, v in found.items() if k != key}
    old = records.write(tmp_path / "old.json", "randomised", found)  # a record from before they were there
    assert report.certified_aims(old).frame.empty and "*" not in report.certified_overview(old).markdown()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"aims": {"W_2 l2 1/3": 10}}, "W_2 l2 1/3"),
        ({"aims": {"clean": "none"}}, "aims: clean"),
        ({"draws": [100]}, "2 sigmas and 1 numbers of draws"),
    ],
)
def test_what_fits_nothing_is_refused_before_any_work(tmp_path, monkeypatch, changed, told):
    monkeypatch.setattr("wdat.studies.randomisation.run_all", None)
    with pytest.raises(ValueError, match=told):
        run(tmp_path, **changed)
