"""Checkpoints of a run: what they belong to, so that those of another are refused, naming what differs."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from wdat.digest import version
from wdat.records import read_tensors
from wdat.threats.ball import Threat
from wdat.training.objectives import Objective
from wdat.training.recipes import Recipe
from wdat.zoo.data import Data
from wdat.zoo.identity import identify, same


def identify_run(
    model: nn.Module, train: Data, recipe: Recipe, validation: Data | None, threat: Threat | None
) -> dict[str, str | Tensor]:
    """What a checkpoint belongs to, as text, so that a mismatch can be named; and the network's logits."""
    made_of, logits = identify(model, train)
    facts = {key: repr(value) for key, value in asdict(replace(recipe, objective=Objective(""))).items()}
    return facts | {
        "objective": repr(recipe.objective), "network": made_of, "logits": logits, "data": train.sha256,
        "validation": f"{validation.sha256} {threat!r}" if validation else "none",
        "library": version("wdat.training.loop.finetune"),
    }  # fmt: skip


def load(path: Path, identity: dict[str, str | Tensor]) -> dict:
    """The checkpoint there. ValueError for one that can not be read or is another run's."""
    try:
        saved = read_tensors(path)
        theirs = saved["identity"]
        changed = [] if same(identity["logits"], theirs.get("logits", torch.empty(0))) else ["logits"]
    except Exception as error:
        raise ValueError(
            f"checkpoint {path} can not be read ({type(error).__name__}); delete it to start anew"
        ) from error
    changed = [k for k in identity if k != "logits" and theirs.get(k) != identity[k]] or changed
    if changed:
        before, now = ({k: " ".join(str(facts.get(k)).split())[:60] for k in changed} for facts in (theirs, identity))
        shown = "; ".join(f"{k}: {before[k]} -> {now[k]}" for k in changed)
        raise ValueError(f"checkpoint {path} belongs to another run ({shown}); delete it or name another file")
    return saved
