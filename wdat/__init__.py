"""Wasserstein distributional robustness of neural networks: attacks, sensitivity, optimal allocation, certificates.

The names below are the whole front door; each lives in the module named beside it and is imported on first use. In the
examples of their docstrings `data` are 60 embedded digits, `x` and `y` their images and labels, `model` is a linear
network that is right on most of them, and `folder` an empty one.
"""

import importlib
import warnings

warnings.filterwarnings("ignore", "IProgress not found")  # a kernel without ipywidgets has tqdm's plain bars

_HOME = {
    "Threat": "threats.ball",
    "load_data": "zoo.data",
    "from_tensors": "zoo.data",
    "Data": "zoo.data",
    "Randomised": "zoo.noise",
    "Biased": "zoo.networks",
    "Normalised": "zoo.networks",
    "load_model": "zoo.models",
    "save_model": "zoo.models",
    "export_robustbench": "zoo.models",
    "fold_normalisation": "zoo.networks",
    "attack": "attacks.pgd",
    "Attack": "attacks.pgd",
    "fgsm": "attacks.pgd",
    "pgd": "attacks.pgd",
    "w_fgsm": "attacks.pgd",
    "w_pgd": "attacks.pgd",
    "w_pgd_budget": "attacks.pgd",
    "temperature_pgd": "attacks.temperature",
    "dual_attack": "attacks.dual",
    "Pixels": "threats.images",
    "upsilon": "threats.sensitivity",
    "minimal_distances": "attacks.nearest",
    "certified_radii": "accuracy.crown",
    "accuracy_curve": "accuracy.allocation",
    "adversarial_set": "accuracy.allocation",
    "certify": "randomised.certify",
    "evaluate": "studies.evaluation",
    "frame": "report.frame",
    "Recipe": "training.recipes",
    "finetune": "training.loop",
    "interpolate": "training.loop",
    "with_class_bias": "studies.worst_class",
    "find_ticket": "tickets.search",
    "masked": "zoo.sparse",
    "tangent_kernel": "tickets.kernels",
    "plain": "training.objectives",
    "at": "training.objectives",
    "trades": "training.objectives",
    "mart": "training.objectives",
    "w_trades": "training.objectives",
    "combined": "training.objectives",
    "water_level": "training.objectives",
    "ibp": "training.objectives",
    "mtl_ibp": "training.objectives",
    "consistency": "training.objectives",
    "macer": "training.objectives",
    "certificate": "training.objectives",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'wdat' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"wdat.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
