"""Wasserstein distributional robustness of neural networks: attacks, sensitivity, exact accuracy, fine-tuning.

The names below are the whole front door; each lives in the module named beside it and is imported on first use.
"""

import importlib

_HOME = {
    "Threat": "threat",
    "load_data": "data",
    "from_tensors": "data",
    "Data": "data",
    "load_model": "models",
    "save_model": "models",
    "export_robustbench": "models",
    "attack": "attacks",
    "fgsm": "attacks",
    "pgd": "attacks",
    "w_fgsm": "attacks",
    "w_pgd": "attacks",
    "w_pgd_budget": "attacks",
    "dual_attack": "dual",
    "Pixels": "images",
    "upsilon": "sensitivity",
    "minimal_distances": "radii",
    "certified_radii": "certify",
    "accuracy_curve": "allocation",
    "adversarial_set": "allocation",
    "evaluate": "evaluation",
    "Recipe": "recipes",
    "finetune": "finetuning",
    "interpolate": "finetuning",
    "at": "objectives",
    "trades": "objectives",
    "mart": "objectives",
    "w_trades": "objectives",
    "combined": "objectives",
    "water_level": "objectives",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'wdat' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"wdat.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
