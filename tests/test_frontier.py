"""Methods trained for a noise draw: chosen on validation images, certified on test images, resumed, shown."""

import pytest
from nets import images, labels, relu

import wdat
from wdat import records
from wdat.report import frontier as report
from wdat.studies.frontier import frontier
from wdat.zoo.data import from_tensors

THREATS = [wdat.Threat(d, 2, 2) for d in ("1/8", "1/2")]
BASE = {"epochs": 1, "lr": 0.05, "batch_size": 16, "objective": {"kind": "plain"}}
VARIANTS = [
    {"name": "noise alone", "sweep": [{"lr": 0.0}, {"lr": 0.05}]},
    {"name": "certificate", "objective": {"kind": "certificate", "delta": "1/4", "r": 2}},
]


def run(work):
    model = relu()
    x = images(72)
    data = from_tensors(x, labels(model, x, 5), classes=list("abcd"))
    index = list(range(72))
    return frontier(
        {"small": model}, data.at(index[:48]), data.at(index[48:]), THREATS, work, base=BASE, variants=VARIANTS,
        sigmas=[0.2, 0.6], repeats=[0, 1], draws=100, progress=False,
        starts={"further": {**BASE, "objective": {"kind": "plain"}}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(tmp_path_factory.mktemp("frontier"))


def test_settings_are_chosen_on_validation_images_alone(found):
    for choice in found["chosen"]:
        place = {key: choice[key] for key in ("network", "method")}.items()
        own = [r for r in found["tried"] if place <= r.items()]
        kept = {(r["variant"], r["sigma"]) for r in found["runs"] if place <= r.items()}
        k = found["threats"].index(choice["threat"])

        def mean(setting, own=own, k=k):
            return sum(r["validation"]["plug_in"][k] for r in own if (r["variant"], r["sigma"]) == setting)

        assert max(kept, key=mean) == (choice["variant"], choice["sigma"])
    for method in ("noise alone", "certificate"):
        for sigma in (0.2, 0.6):
            place = {"network": "small", "method": method, "sigma": sigma}.items()
            own = [r for r in found["tried"] if place <= r.items()]
            totals = {v: sum(sum(r["validation"]["plug_in"]) for r in own if r["variant"] == v) for v in
                      {r["variant"] for r in own}}  # fmt: skip
            runs = [r for r in found["runs"] if place <= r.items()]
            assert {r["variant"] for r in runs} == {max(totals, key=totals.get)} and len(runs) == 2


def test_other_starts_are_trained_by_the_first_method_alone(found):
    tried = [r for r in found["tried"] if r["network"] == "further"]
    assert {r["method"] for r in tried} == {"noise alone"} and len(tried) == 2 * 2 * 2
    still = [next(r for r in found["tried"] if (r["network"], r["variant"][-5:], r["sigma"], r["seed"]) ==
             (name, tried[0]["variant"][-5:], 0.2, 0)) for name in ("small", "further")]  # fmt: skip
    assert still[0]["validation"] != still[1]["validation"]  # another network, with the rate 0 too


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"variants=\[\]"):
        frontier({}, None, None, THREATS, tmp_path, base=BASE, variants=[], sigmas=[0.1], repeats=[0])


def test_what_is_proved_is_below_what_was_counted(found):
    assert found["n_train"] + found["n_validation"] == 48 and found["n_test"] == 24
    assert {r["passes"] for r in found["runs"]} == {3, 6}
    for row in found["runs"]:
        near, far = row["test"]["lower"]
        assert row["test"]["accuracy"] > near >= far >= 0


def test_a_second_run_takes_what_is_there(tmp_path, monkeypatch, found):
    assert run(tmp_path) == found
    monkeypatch.setattr("wdat.randomised.counts.noise", None)  # nothing can be drawn any more
    assert run(tmp_path) == found


def test_the_record_is_shown(tmp_path, found):
    path = records.write(tmp_path / "12.json", "frontier", found)
    table, drawing = report.frontier(path), report.frontiers(path)
    assert "noise alone" in table.markdown() and len(table.frame) == 3
    assert len(drawing.axes) == 2
    for number, axis in enumerate(drawing.axes):
        first, other = (bars.lines[0].get_xydata()[0] for bars in axis.containers)
        sigma = next(c["sigma"] for c in found["chosen"] if c["threat"]["written"] == ("1/8", "1/2")[number])
        runs = [r for r in found["runs"] if (r["network"], r["sigma"]) == ("small", sigma)]
        lower = [sum(r["test"]["lower"][number] for r in runs if r["method"] == m) / 2
                 for m in ("noise alone", "certificate")]  # fmt: skip
        assert first.tolist() == [0, 0] and other[1] == pytest.approx(100 * (lower[1] - lower[0]))
    assert (tmp_path / "12.png").is_file() and (tmp_path / "12.md").is_file()
