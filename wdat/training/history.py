"""What is known of a run: rows of its history, accuracy on validation images, dual norms of its training images.

Of several workers each looks at a share of the images, see `wdat.threats.joint`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wdat.attacks.pgd import w_pgd
from wdat.threats import joint
from wdat.threats.ball import Threat
from wdat.threats.images import logits_of
from wdat.threats.losses import margin
from wdat.threats.seeds import derive_seed
from wdat.threats.sensitivity import dual_norms
from wdat.training.objectives import Objective
from wdat.training.recipes import Recipe
from wdat.zoo.data import Data
from wdat.zoo.noise import Randomised


@contextmanager
def refreshed(n: int, recipe: Recipe) -> Iterator[Tensor]:
    """Those here of the images that a refresh looks at: all, or the rule's random subset, the same at every refresh."""
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, -1))
    count = min(recipe.upsilon.subset or n, n)
    index = torch.randperm(n, generator=generator)[:count] if count < n else torch.arange(n)
    part = joint.share(count)
    with joint.shared(count):
        yield index[part] if part.stop > part.start else index  # fewer images than workers: all have all


def training_norms(network: nn.Module, train: Data, index: Tensor, term: object, recipe: Recipe) -> Tensor:
    """Dual norms of these images of the training set, behind the recipe's noise."""
    network = recipe.behind(network, train)
    parts = [
        dual_norms(network, *train.batch(i), term.threat, term.budget_loss, recipe.micro_batch)
        for i in index.split(2048)
    ]
    return torch.cat(parts)


def summary(
    epoch: int, rate: float, sums: dict, objective: Objective, trackers: list, n: int, history: list[dict]
) -> dict:
    """One row of plain numbers from the epoch's sums."""
    mean = {key: float(value) / n for key, value in sums.items()}
    row = {"epoch": epoch + 1, "lr": rate, "loss": mean["loss"], "accuracy": mean["correct"], "terms": []}
    for number, (term, tracker) in enumerate(zip(objective.terms, trackers, strict=True)):
        own = {key.split(".", 1)[1]: value for key, value in mean.items() if key.startswith(f"{number}.")}
        order = 1.0 if term.threat.pointwise else term.threat.p
        facts = {"threat": str(term.threat), "moved": own["moved^p"] ** (1 / order)}
        if "epsilon^p" in own:
            facts["realised_delta"] = own["epsilon^p"] ** (1 / order)
        if tracker:
            facts[term.tracked] = float(tracker.value)
        facts |= {key: own[key] for key in ("capped", "idle", "norm") if key in own}
        if "norm" in own:
            first = history[0]["terms"][number]["norm"] if history else own["norm"]
            facts["norm_ratio"] = own["norm"] / first if first else 1.0
        row["terms"].append(facts)
    return row


def validate(network: nn.Module, data: Data, threat: Threat | None, recipe: Recipe) -> dict:
    """Accuracy on images held out, clean (with noise in the recipe of one draw) and by W-PGD of ten steps."""
    size, shown = recipe.micro_batch, Randomised(network, recipe.noise) if recipe.noise else network
    part = joint.share(len(data))
    alike = recipe.noise or part.stop == part.start  # one draw of the whole set; fewer images than workers
    x, y = data.batch(slice(None) if alike else part)
    with joint.shared(len(data)):
        logits = logits_of(shown, x, size)
        row = {"validation_accuracy": float(joint.mean((margin(logits, y.to(logits.device)) > 0).double()))}
        if threat and not recipe.noise:
            found = w_pgd(network, x, y, threat, steps=10, batch_size=size)
            row["validation_w_pgd"] = float(joint.mean(found.correct.double()))
    return row
