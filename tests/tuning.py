"""Small fine-tuning runs: the data, the quick settings, what they changed; shared by the tests of fine-tuning."""

import torch
from nets import images, labels
from torch import nn

from wdat.threats.ball import Threat
from wdat.training.loop import finetune
from wdat.zoo.data import Data, from_tensors

N = 30
THREAT = Threat(0.05, 2)
QUICK = {"epochs": 3, "batch_size": 8, "lr": 0.05}  # 4 steps an epoch, the last one smaller


def data(model: nn.Module, n: int = N, seed: int = 0) -> Data:
    x = images(n, seed=seed)
    return from_tensors(x, labels(model, x), classes=["a", "b", "c", "d"])


def run(model, train, recipe, **settings):
    return finetune(model, train, recipe, progress=False, **settings)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(before: dict, after: nn.Module) -> list[str]:
    return [key for key, value in after.state_dict().items() if not torch.equal(value, before[key])]
