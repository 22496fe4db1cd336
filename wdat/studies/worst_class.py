"""The worst class raised: class weights or radii in training, a bias on the logits afterwards, each at equal cost.

A network is trained adversarially; then every method goes on from there for as many rounds. After each round
validation images under attack say how each class stands, and set the weights or radii of the next.
Sources: Tian et al., arXiv 2105.14240; class-wise radii of CFA, Wei et al., arXiv 2303.14460. The weights are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wdat.attacks.pgd import attack
from wdat.clock import spending
from wdat.settings import reads
from wdat.studies.checkpoints import Measures, trained
from wdat.studies.jobs import Run, resident, run_all
from wdat.threats.ball import Threat, as_threat
from wdat.threats.inputs import as_model, taking
from wdat.training.recipes import make_recipe
from wdat.zoo.adapt import DataLike, as_data
from wdat.zoo.data import Data, check_fit, check_same_classes
from wdat.zoo.networks import Biased

LOST = 0.01  # of the average accuracy under attack on validation images that a bias may cost


@dataclass(frozen=True)
class Rounds:
    """How the methods train.

    Args:
        start: recipe that makes the network robust, the same for all.
        further: recipe of one round; its objective has one pointwise term.
        rounds: how many.
        weight, floor: class weights are 1 + weight * ((1 - t_c) / mean(1 - t) - 1), class radii (floor + t_c) times
            the objective's, t_c the validation accuracy of class c under attack, its mean over the rounds so far.
        biases, bias_step: how often the logit of the class that is worst is raised, and by how much.
        validation: share of the training images held out. steps: of the attack on them.
    """

    start: dict
    further: dict
    rounds: int = 5
    weight: float = 0.5
    floor: float = 0.5
    biases: int = 20
    bias_step: float = 0.1
    validation: float = 0.25
    steps: int = 10


def worst_class(
    model: nn.Module, train: Data, test: Data, rounds: Rounds, seeds: Sequence[int], measures: Measures,
    work: Path, *, jobs: int = 1, progress: bool = True,
) -> dict:  # fmt: skip
    """Each seed and method, measured on test images; resumes from `work`.

    "runs": rows {"method", "seed", "measured" on test images, "factors" of the last round or "bias"}. "logit bias" is
    on the network of "none", chosen on validation images under attack: the highest worst class that costs at most a
    point of the average; the attack on test images sees the biased network.
    """
    for data in (train, test):
        check_fit(model, data, [measures.pointwise])
    check_same_classes(train, test)
    rest, held = train.split_off(rounds.validation, seed=0)
    shared = {"model": model, "train": rest, "held": held, "test": test, "rounds": rounds, "measures": measures}
    calls = [Run(f"seed {seed}", _methods, {**shared, "work": work, "seed": seed}) for seed in seeds]
    found = run_all(calls, jobs, desc="worst class", memory=resident(), progress=progress)
    return {
        "n_train": len(rest), "n_validation": len(held), "n_test": len(test), "seeds": len(seeds),
        "runs": [row for rows in found for row in rows], "steps": measures.steps,
        "pointwise": measures.pointwise.describe(), "threats": [t.describe() for t in measures.threats],
    }  # fmt: skip


def _methods(
    model: nn.Module, train: Data, held: Data, test: Data, rounds: Rounds, measures: Measures, work: Path, seed: int
) -> list[dict]:
    """All methods of one seed."""
    ball, rows, ends = measures.pointwise, [], {}
    start = trained(model, train, held, make_recipe(rounds.start, seed), ball, work / f"start.{seed}").last
    for method in METHODS:
        network, factors, name, seen = start, None, method.replace(" ", "_"), []
        for number in range(rounds.rounds):
            objective = dict(rounds.further["objective"])
            if method in FACTORS:
                seen.append(standing_classes(network, held, ball, rounds.steps))
                factors = FACTORS[method](torch.stack(seen).mean(0), rounds)
                objective[name] = factors
            recipe = make_recipe({**rounds.further, "objective": objective}, 1000 * seed + number)
            network = trained(network, train, held, recipe, ball, work / f"{name}.{seed}.{number}").last
        rows.append({"method": method, "seed": seed, "factors": factors})
        ends[method] = network
    biased = with_class_bias(ends["none"], held, ball, tries=rounds.biases, step=rounds.bias_step, steps=rounds.steps)
    rows.append({"method": "logit bias", "seed": seed, "bias": biased.bias.tolist()})
    ends["logit bias"] = biased
    return [row | {"measured": measures.of(ends[row["method"]], test, work / "parts")} for row in rows]


def standing_classes(model: nn.Module, data: Data, threat: Threat, steps: int) -> Tensor:
    """Accuracy of each class under PGD, float64 (classes,); a class without images has that of the whole set."""
    with spending("evaluation"):
        correct = attack(model, *data.stored(), threat, loss="ce", steps=steps).correct.cpu().double()
    counts = data.y.bincount(minlength=len(data.classes))
    right = torch.zeros(len(data.classes), dtype=torch.float64).index_add_(0, data.y, correct)
    return torch.where(counts > 0, right / counts.clamp_min(1), correct.mean())


def class_weights(standing: Tensor, rounds: Rounds) -> list[float]:
    """Weights of mean 1, the larger the less of a class is left; never below 0."""
    lost = 1 - standing
    raised = (1 + rounds.weight * (lost / lost.mean().clamp_min(1e-9) - 1)).clamp_min(0)
    return (raised / raised.mean()).tolist()


def class_radii(standing: Tensor, rounds: Rounds) -> list[float]:
    """Factors of the radius, the larger the more of a class is left."""
    return (rounds.floor + standing).tolist()


@taking(model=as_model, data=as_data, threat=as_threat)
@reads("with_class_bias")
def with_class_bias(
    model: nn.Module, data: DataLike, threat: Threat, *, tries: int = 20, step: float = 0.1, steps: int = 10,
    lost: float = LOST,
) -> Biased:  # fmt: skip
    """The network with a bias on its logits that raises the class worst under attack, at no cost in passes.

    The class worst under PGD on `data` (validation images; `steps` long) has its logit raised by `step` and all is
    attacked anew, `tries` times. Taken is the highest accuracy of the worst class among the biases whose average is at
    most `lost` below that without bias. `wdat.save_model` keeps it. threat: a pointwise ball (p = inf).

    >>> wdat.with_class_bias(model, data, wdat.Threat("1/32", "inf"), tries=2, steps=2).bias.shape
    torch.Size([10])
    """
    check_fit(model, data, [threat])
    if not threat.pointwise or min(tries, lost) < 0 or step <= 0 or steps < 1:
        raise ValueError(
            f"tries={tries} and lost={lost} must be >= 0, step={step} > 0, steps={steps} >= 1 and p={threat.p:g} inf"
        )
    bias, tried = torch.zeros(len(data.classes), dtype=torch.float64), []
    for _ in range(tries + 1):
        standing = standing_classes(Biased(model, bias.tolist()).eval(), data, threat, steps)
        average = float((standing[data.y]).mean())
        tried.append((float(standing.min()), average, bias.tolist()))
        bias[int(standing.argmin())] += step
    allowed = [one for one in tried if one[1] >= tried[0][1] - lost]
    return Biased(model, max(allowed, key=lambda one: one[:2])[2]).eval()


FACTORS = {"class weights": class_weights, "class radii": class_radii}
METHODS = ("none", *FACTORS)
