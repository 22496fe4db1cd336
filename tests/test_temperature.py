"""Temperature-PGD: plain PGD at T = 1, invariance to the scale of logits, no stall, the worst case."""

import pytest
import torch
from nets import images, relu
from torch import nn

from wdat import records
from wdat.attacks.pgd import pgd
from wdat.attacks.temperature import TEMPERATURES, temperature_pgd
from wdat.report import figures
from wdat.report.rows import loss_name
from wdat.studies.evaluation import evaluate
from wdat.threats.ball import Threat
from wdat.threats.losses import at_temperature
from wdat.zoo.data import from_tensors


class Scaled(nn.Module):
    """A network whose logits are multiplied: more confident, the same classifier."""

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.network(x)


@pytest.fixture
def case() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = relu(5).eval()
    x = images(40, (2, 3, 3))
    with torch.no_grad():
        return model, x, model(x).argmax(1)


SETTINGS = {"delta": 0.1, "steps": 4, "batch_size": 16}


def test_temperature_one_is_pgd_bit_for_bit(case):
    model, x, y = case
    plain = pgd(model, x, y, **SETTINGS)
    for found in (
        pgd(model, x, y, loss=at_temperature(1), **SETTINGS), temperature_pgd(model, x, y, temperatures=[1], **SETTINGS)
    ):  # fmt: skip
        for name in ("x", "logits", "values", "correct", "norms", "history"):
            assert torch.equal(getattr(found, name), getattr(plain, name))
        assert found.passes == plain.passes


def test_temperature_undoes_the_scale_of_logits(case):
    """The attack on c f at T = c t is that on f at T = t; a power of two, so bit for bit."""
    model, x, y = case
    for t in (0.1, 3.0):
        one = pgd(model, x, y, loss=at_temperature(t), **SETTINGS)
        other = pgd(Scaled(model, 64.0), x, y, loss=at_temperature(64 * t), **SETTINGS)
        assert torch.equal(one.x, other.x) and torch.equal(one.correct, other.correct)


def test_where_cross_entropy_underflows_no_temperature_stalls(case):
    model, x, y = case
    sure = Scaled(model, 1e5)
    moved = {t: pgd(sure, x, y, loss=at_temperature(t), keep="last", **SETTINGS).norms for t in (1, 0.02, 1e-9, 1e9)}
    assert (moved.pop(1) == 0).any()  # what PGD itself does there
    assert all((norms > 0).all() for norms in moved.values())


def test_the_worst_case_is_that_of_every_temperature_alone(case):
    model, x, y = case
    for start in ("clean", (x + 0.05).clamp(0, 1)):
        alone = [
            pgd(model, x, y, loss=at_temperature(t), keep="loss", start=start, **SETTINGS).correct for t in TEMPERATURES
        ]
        found = temperature_pgd(model, x, y, keep="loss", start=start, **SETTINGS)
        assert torch.equal(found.correct, torch.stack(alone).all(0))
    assert alone[0].sum() > found.correct.sum() > 0  # on this network others find more than T = 1
    with torch.no_grad():
        assert torch.equal(model(found.x).argmax(1) == y, found.correct)
    assert (found.x - x).abs().max() <= 0.1 and found.norms.max() <= 0.1
    assert found.passes < 9 * len(TEMPERATURES)  # only images that stand are attacked again


def test_radii_of_images_stay_their_own(case):
    model, x, y = case
    radii = torch.linspace(0, 0.2, len(x))
    found = temperature_pgd(model, x, y, radii=radii, **SETTINGS)
    assert (found.norms <= radii).all() and (found.norms > 0.1).any()
    with pytest.raises(ValueError, match="no temperature"):
        temperature_pgd(model, x, y, 0.1, temperatures=())


def test_an_evaluation_takes_a_temperature_by_name_and_its_figures_show_it(case, tmp_path):
    model, x, y = case
    losses, threat = ("redlr", at_temperature(0.1)), Threat("0.05")
    found = evaluate(model, from_tensors(x, y), [threat], losses=losses, steps=3, curve=5, progress=False)
    assert {row["loss"] for row in found["attacks"]} == set(losses)
    record = records.write(
        tmp_path / "own.json", "evaluation", {"n": len(x), "networks": [{"network": "own", **found}]}
    )
    figures.curves(record, "inf")
    assert (tmp_path / "own-curves-linf.png").is_file() and loss_name(losses[1]) == "CE T=0.1"
