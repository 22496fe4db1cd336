"""The fine-tuning study: settings expanded, chosen on validation images alone, diverged runs listed, all resumable."""

import json

import pytest
import torch

from wdat.report.rows import chosen_runs
from wdat.studies import study, sweeps
from wdat.studies.study import Measured, Study, Sweep
from wdat.threats.ball import Threat
from wdat.zoo.data import from_tensors, load_data
from wdat.zoo.networks import Normalised, build


def test_variants_expand_to_settings_of_the_recipe_and_of_its_objective():
    base = {"objective": {"kind": "w-trades", "delta": "1/16"}, "epochs": 3, "lr": 0.1}
    plain, first, second = sweeps.expand(
        [
            {"name": "plain", "objective": {"kind": "plain"}},
            {"name": "at", "objective": {"kind": "at"}, "sweep": [{"delta": 0.1}, {"delta": 0.2, "lr": 0.01}]},
        ],
        base,
    )
    assert (plain["variant"], plain["method"]) == ("plain", "plain") and plain["recipe"]["objective"] == {
        "kind": "plain"
    }
    assert first["variant"] == "at (delta 0.1)" and first["recipe"]["lr"] == 0.1
    assert second["recipe"] == {"objective": {"kind": "at", "delta": 0.2}, "epochs": 3, "lr": 0.01}
    assert second["method"] == "at" and second["variant"] == "at (delta 0.2, lr 0.01)"
    with pytest.raises(ValueError, match="share a name"):
        sweeps.expand([{"name": "a"}, {"name": "a"}], base)


def one(clean: float, near: float, exact: float) -> study.Measured:
    validation = {"clean": clean, "pointwise": {"d": near}, "optimal": {"t": exact}}
    return study.Measured({"validation": validation}, torch.ones(1))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"a": one(0.80, 0.5, 0.30), "b": one(0.795, 0.5, 0.35), "c": one(0.70, 0.5, 0.50)}, ("b", True)),
        ({"a": one(0.80, 0.4, 0.60), "b": one(0.80, 0.497, 0.20)}, ("b", True)),  # pointwise lost
        ({"a": one(0.60, 0.5, 0.60), "b": one(0.75, 0.5, 0.20)}, ("b", False)),  # none keeps it: the nearest
    ],
)
def test_a_setting_is_chosen_within_the_margins_on_validation_images(settings, expected):
    before = one(0.80, 0.5, 0.2)
    assert sweeps._choose({k: [v] for k, v in settings.items()}, before, "t", ["d"]) == expected


@pytest.fixture(scope="module")
def digits():
    train, test = load_data("digits", "train").take(160, seed=0), load_data("digits", "test").take(60, seed=0)
    torch.manual_seed(0)
    network = Normalised([0.5], [0.5], build("digits_cnn", width=4))
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(train.x), train.y).backward()
        optimiser.step()
    return {"small": network.eval()}, train, test


@pytest.mark.slow
def test_the_study_measures_chooses_compares_and_resumes(digits, tmp_path):
    models, train, test = digits
    sweep = Sweep(
        base={"objective": {"kind": "plain"}, "epochs": 1, "lr": 0.01},
        variants=[
            {"name": "plain"},
            {"name": "proposed", "objective": {"kind": "w-trades", "steps": 2},
             "sweep": [{"delta": 0.02}, {"delta": 0.1}]},
            {"name": "wild", "lr": 1e30},
        ],
        seeds=[0, 1], threats=[Threat("1/16"), Threat("2/16")], proposed=["proposed"], baselines=["plain"],
        pointwise=["1/16"], steps=2, search={"steps": 3}, draws=30,
    )  # fmt: skip
    found = sweeps.finetuning(models, train, test, sweep, tmp_path, progress=False)
    assert [(r["variant"], r["seed"]) for r in found["runs"]] == [("before", None)] + [
        (v, s) for v in ("plain", "proposed (delta 0.02)", "proposed (delta 0.1)") for s in (0, 1)
    ]
    assert {(d["variant"], d["seed"]) for d in found["diverged"]} == {("wild", 0), ("wild", 1)}
    chosen = {c["method"]: c["variant"] for c in found["chosen"]}
    assert chosen["plain"] == "plain" and chosen["proposed"].startswith("proposed (") and "wild" not in chosen
    for row in found["runs"]:
        assert ("w_pgd" in row["after"]) == (row["variant"] in ("before", *chosen.values()))
        assert row["after"]["optimal"]["2/16"] <= row["after"]["optimal"]["1/16"] <= row["after"]["clean"]
        if "w_pgd" in row["after"]:
            assert row["after"]["optimal"]["2/16"] <= row["after"]["w_pgd"]["2/16"] + 1e-9
    assert {(c["proposed"], c["delta"]) for c in found["comparison"]} == {("proposed", "1/16"), ("proposed", "2/16")}
    assert [(c["method"], c["delta"]) for c in found["validated"]] == [
        (name, d) for d in ("1/16", "2/16") for name in ("proposed", "plain", "best proposed")
    ]
    after = {(r["variant"], r["seed"]): r["after"] for r in found["runs"]}
    for row in found["validated"]:
        seeds = [after[row["setting"], seed] for seed in (0, 1)]
        assert row["clean"] == pytest.approx(sum(own["clean"] for own in seeds) / 2)
    assert sweeps.finetuning(models, train, test, sweep, tmp_path, progress=False) == found
    apart = sweeps.finetuning(models, train, test, sweep, tmp_path / "apart", jobs=3, progress=False)
    assert json.dumps(apart) == json.dumps(found)


def test_networks_on_the_way_are_further_settings_of_a_method(digits, tmp_path, monkeypatch):
    # the real one: test_evaluation
    monkeypatch.setattr(
        study, "autoattack_accuracy",
        lambda model, data, **_: {
            "accuracy": 0.5, "correct": torch.ones(len(data), dtype=torch.bool), "norms": torch.zeros(len(data)),
        },
    )  # fmt: skip
    models, train, test = digits
    sweep = Sweep(
        base={"objective": {"kind": "plain"}, "epochs": 1, "lr": 0.01},
        variants=[{"name": "plain"}, {"name": "proposed", "objective": {"kind": "w-trades", "delta": 0.1, "steps": 2}}],
        seeds=[0], threats=[Threat("1/16"), Threat("2/16")], proposed=["proposed"], baselines=["plain"],
        pointwise=["1/16"], attacked=["2/16"], steps=2, search={"steps": 3}, draws=30, shares=[0.0, 0.5],
        autoattacked=["1/16"], autoattack_all=True,
    )  # fmt: skip
    found = sweeps.finetuning(models, train, test, sweep, tmp_path, progress=False)
    runs = {(run["method"], run.get("share")): run for run in found["runs"]}
    assert set(runs) == {("before", None), *((m, s) for m in ("plain", "proposed") for s in (None, 0.0, 0.5))}
    assert runs["proposed", 0.5]["variant"] == "proposed, 0.5 of the way" and runs["proposed", 0.5]["of"] == "proposed"
    for method in ("plain", "proposed"):
        assert runs[method, 0.0]["validation"] == runs["before", None]["validation"]
        assert runs[method, None]["history"] and not runs[method, 0.5]["history"]
        assert "autoattack" in runs[method, None]["after"]
    chosen = [c["variant"] for c in found["chosen"]]
    for run in found["runs"]:
        assert ("autoattack" in run["after"]) == ("of" not in run or run["variant"] in chosen)
        assert run["after"].get("autoattack_n", len(test)) == len(test)
        assert list(run["after"].get("w_pgd", ["2/16"])) == ["2/16"]
        assert ("autoattack" in run["after"]) == ("autoattack_n" in run["after"])
    (row,) = (row for row in found["comparison"] if row["offset"] == 0 and row["delta"] == "1/16")
    assert row["accuracy"]["proposed"] >= runs["before", None]["after"]["optimal"]["1/16"] - 1e-9
    drawn = chosen_runs(found)
    assert all(run["before"] or len(run["history"]) == 1 for run in drawn) and len(drawn) == 3


def test_the_forecast_names_runs_memory_and_time(digits):
    models, train, _ = digits
    variants = [
        {"name": "plain", "objective": {"kind": "plain"}},
        {"name": "at", "objective": {"kind": "at", "delta": 0.1}},
    ]
    text = sweeps.forecast(models, train, Sweep({"epochs": 2}, variants, [0, 1], [Threat(1)]))
    assert text.startswith("4 runs; the dearest, at,") and "small: " in text and "160 images" in text


def test_what_attacks_flip_belongs_to_the_curve_of_their_run(tiny_model, tiny_data, tmp_path):
    """As if the search had found nothing: the curve is then what W-PGD and AutoAttack flipped."""
    data = from_tensors(*tiny_data)
    sweep = Sweep({}, [{"name": "plain"}], [0], [Threat("1/16"), Threat("1/4")], 0.2, pointwise=["1/8"], steps=5,
                  autoattack_images=8)  # fmt: skip
    study = Study("tiny", tiny_model, data, data, data, sweep, tmp_path)
    before = study._measure(tiny_model, network="tiny", variant="before", method="before", seed=None, before=True)
    blind = Measured(before.row, torch.where(before.distance > 0, torch.inf, 0.0))
    after = study.attack(blind, ["1/8"])
    assert all(after["optimal"][d] <= after["w_pgd"][d] < after["clean"] for d in ("1/16", "1/4"))
    assert after["nearest"]["1/8"] <= after["autoattack"]["1/8"] < 1 and after["autoattack_n"] == 8
