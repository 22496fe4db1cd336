"""The trials run, at their quick size, and find nothing; hostile files one by one."""

import tempfile
from pathlib import Path

import pytest
import torch

import wdat
from benchmarks.trials import __main__ as trials
from benchmarks.trials import files
from wdat import records
from wdat.zoo.networks import build

with tempfile.TemporaryDirectory() as place:
    NAMES = list(files.hostile(Path(place)))


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_is_refused_and_nothing_of_it_runs(name, tmp_path):
    found = files.given(tmp_path, files.hostile(tmp_path)[name])
    assert found["refused"] and not found["ran"], found["said"]


def test_one_changed_bit_in_what_is_resumed_from_is_no_number(tiny_model, tiny_data, tmp_path):
    recipe, data = wdat.Recipe({"kind": "plain"}, epochs=1), wdat.from_tensors(*tiny_data)
    settings = {"steps": 1, "optimal": False, "losses": ("ce",), "progress": False, "state": tmp_path / "state"}
    wdat.finetune(tiny_model, data, recipe, checkpoint=tmp_path / "run.pt", progress=False)
    wdat.evaluate(tiny_model, data, "1/16", **settings)
    for path in (tmp_path / "run.pt", *settings["state"].iterdir()):
        path.write_bytes(files.changed(path.read_bytes()))
    with pytest.raises(ValueError, match=r"run\.pt can not be read .*; delete it"):
        wdat.finetune(tiny_model, data, recipe, checkpoint=tmp_path / "run.pt", progress=False)
    with pytest.raises(ValueError, match=r"state file .* can not be read; delete it"):
        wdat.evaluate(tiny_model, data, "1/16", **settings)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m, x, y: wdat.attack(m, x.to_sparse(), y, "1/16"), "images are a sparse tensor"),
        (
            lambda m, x, y: wdat.attack(m, x, y, "1/16", steps="many"),
            "attack: steps is 'many'; expected a whole",
        ),
        (lambda m, x, y: wdat.attack(m, x, y, "1/16", reference="no"), "reference is 'no'; expected true or"),
        (lambda m, x, y: wdat.w_pgd_budget(m, x, y, "1/16", batch_size=0), "batch_size=0"),
        (lambda m, x, y: wdat.w_pgd_budget(m, x, y, "1/16", budget_loss=3), "the loss is 3"),
        (lambda m, x, y: wdat.dual_attack(m, None, y, "1/16"), "x is None; expected a Tensor"),
        (lambda m, x, y: wdat.temperature_pgd(m, x, y, "1/16", temperatures=[None]), "temperatures is .None."),
        (lambda m, x, y: wdat.certified_radii(m, x, y, 2, batch_size=0), "batch_size=0 >= 1"),
        (lambda m, x, y: wdat.upsilon(m, x, y, "1/16", batch_size=0), "batch_size=0"),
        (lambda m, x, y: wdat.load_model(m, device=1.5), "device 1.5 is unknown"),  # made it float64
        (lambda m, x, y: wdat.load_model(3), "the model is a int"),
        (lambda m, x, y: wdat.load_data(3), "load_data: name is 3"),
        (lambda m, x, y: wdat.from_tensors(x, y + 2**40), "an index of a class"),  # as many names filled the memory
        (lambda m, x, y: wdat.from_tensors(x, y, classes=5), "the classes of tensors are 5"),
        (lambda m, x, y: wdat.Data("a", "all", None, y, ("a", "b")), "images are a NoneType"),
        (lambda m, x, y: wdat.Pixels([1]), "pixels are a list"),
        (lambda m, x, y: wdat.Randomised("net", 0.25), "the model is a str"),
        (lambda m, x, y: wdat.Biased(m, "12345"), "one a class, is '12345'"),
        (lambda m, x, y: build("digits_cnn", width=-1), "can not be built with"),
        (lambda m, x, y: wdat.export_robustbench(3, "a.pt"), "the model is a int"),
        (lambda m, x, y: wdat.accuracy_curve([0.1], 0.1, 2), "distances are a list"),
        (lambda m, x, y: wdat.accuracy_curve(torch.ones(3), {}, 2), "deltas are a dict"),
        (lambda m, x, y: wdat.accuracy_curve(torch.ones(3), 0.1, 2, split="no"), "split is 'no'"),
        (lambda m, x, y: wdat.adversarial_set(x, None, torch.ones(3), 0.1, 2), "expected three tensors"),
        (lambda m, x, y: wdat.certify(m, (x, y), ["W_2 l2 1/4"], 0.25, draws="nan"), "certify: draws is 'nan'"),
        (lambda m, x, y: wdat.Recipe({"kind": "plain"}, weight_decay=-1), "weight_decay=-1"),
        (lambda m, x, y: wdat.w_trades(wdat.Threat("1/16"), step_ratio=-1), "step_ratio=-1"),
        (lambda m, x, y: wdat.interpolate(m, None, 0.5), "the model is a NoneType"),
        (lambda m, x, y: wdat.interpolate(m, m, "half"), "interpolate: share is 'half'"),
        (lambda m, x, y: wdat.with_class_bias(m, (x, y), "W_inf linf 1/16", tries=1.5), "tries is 1.5"),
        (lambda m, x, y: wdat.masked(m, [1]), "no mapping of tensors"),
        (lambda m, x, y: wdat.tangent_kernel(m, x * 255), "divide by 255"),
        (lambda m, x, y: wdat.finetune(m, (x, y), {"epochs": 1}), "Objective|objective"),
        (lambda m, x, y: wdat.finetune(m, (x, y), wdat.Recipe({"kind": "plain"}), checkpoint_every=0), "every=0"),
        (
            lambda m, x, y: wdat.finetune(
                m, (x, y), wdat.Recipe({"kind": "plain"}), validation=(x[:, :2], y), progress=False
            ),
            "its first convolution takes 3 channels, the images have 2",
        ),
    ],
)
def test_what_generated_input_found(call, sentence, tiny_model, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        call(tiny_model, *tiny_data)


def test_a_network_of_whole_numbers_gives_no_logits(tiny_model, tiny_data):
    with pytest.raises(ValueError, match=r"returned torch\.int64; expected logits"):
        wdat.attack(lambda x: tiny_model(x).long(), *tiny_data, "1/16")


@pytest.mark.slow
@pytest.mark.parametrize("part", trials.PARTS)
def test_the_trials_run_and_find_nothing(part, tmp_path):
    trials.main([part, "--quick", "--out", str(tmp_path)])
    found = records.read(tmp_path / f"{part}.json", f"trials-{part}")["results"]
    for row in found.get("works", ()):
        assert row["kills"] >= 3 and row["in_the_same"] == row["runs"] > 0 and not row["left_after"]
        assert not row["unreadable"] + row["wrong"] + row["other_codes"]
    for row in found.get("faults", ()):
        assert row["as_expected"] and row["same_afterwards"] and not row["unreadable"] + row["wrong"], row
    for row in found.get("downloads", ()):
        assert row["arrived"] == row["fetches"] and not row["wrong"], row  # a slow kill may come too late
        assert row["tries"] > row["fetches"] or row["fault"].startswith("The fetch is killed"), row
    for row in found.get("calls", ()):
        assert row["inputs"] > 0 and not row["faults"], row["faults"]
    for row in found.get("files", ()):
        assert row["refused"] and not row["ran"]
