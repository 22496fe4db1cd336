"""RobustBench: the only module that imports it, and only when asked to.

robustbench 1.1.1 requires the package `pyautoattack` but imports `autoattack` (upstream issue 211). `zoo()` registers
a stand-in of that name over pyautoattack first, unless the real one is installed.
"""

import difflib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

LACKING = {  # module that is missing: what to do
    "robustbench": "it is not installed; run: python -m pip install 'wdat[robustbench]'",
    "pkg_resources": "it needs pkg_resources, which setuptools 82 gave up; run: python -m pip install 'setuptools<82'",
}
EPSILON = {  # radius of the threat as the model cards state it, of the networks in notebooks/profiles/cifar10.yaml
    "Zhang2019Theoretically": "0.031",
    "Rade2021Helper_R18_ddpm": "8/255",
    "Wang2023Better_WRN-28-10": "8/255",
    "Peng2023Robust": "8/255",
    "Gowal2021Improving_28_10_ddpm_100m": "8/255",
}  # robustbench, model_info/cifar10/Linf/NAME.json


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what importing robustbench is known to warn of (its and timm's use of old module paths), no more."""
    with warnings.catch_warnings():
        for message, category in (
            (r"`torch\.jit\.\w+` is deprecated", Warning),  # timm, and torch's own import of it
            (r"Importing from timm\.models\.", DeprecationWarning),  # robustbench's architectures
            (r"pkg_resources is deprecated", UserWarning),  # robustbench.loaders
            (r"Deprecated call to `pkg_resources", DeprecationWarning),
        ):
            warnings.filterwarnings("ignore", message, category)
        yield


def _register_autoattack() -> None:
    """Put a module `autoattack` with the reference signature over pyautoattack's keyword-only one in sys.modules."""
    if "autoattack" in sys.modules or importlib.util.find_spec("autoattack") is not None:
        return
    import pyautoattack
    from pyautoattack.state import EvaluationState

    class AutoAttack(pyautoattack.AutoAttack):
        def __init__(
            self,
            model,
            norm="Linf",
            eps=0.3,
            seed=None,
            verbose=True,
            attacks_to_run=(),
            version="standard",
            is_tf_model=False,
            device="cuda",
            log_path=None,
        ) -> None:
            attacks = list(attacks_to_run) or None
            super().__init__(
                model, norm=norm, eps=eps, seed=seed, attacks=attacks, version=version, device=torch.device(device)
            )
            self.verbose = verbose

        def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
            pair = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
            return pair if return_labels else pair[0]

    module, state = ModuleType("autoattack"), ModuleType("autoattack.state")
    module.AutoAttack, module.state, state.EvaluationState = AutoAttack, state, EvaluationState
    sys.modules.update({"autoattack": module, "autoattack.state": state})


@cache
def zoo() -> ModuleType:
    """The imported `robustbench` package (a few seconds the first time); ModuleNotFoundError says how to get it."""
    _register_autoattack()
    try:
        with _quiet():
            import robustbench
            import robustbench.utils
    except ModuleNotFoundError as error:
        if error.name not in LACKING:
            raise
        raise ModuleNotFoundError(
            f"RobustBench's networks need robustbench, and {LACKING[error.name]}", name="robustbench"
        ) from None
    return robustbench


def resnet18(classes: int) -> nn.Module:
    """RobustBench's CIFAR ResNet-18, freshly initialised."""
    zoo()
    from robustbench.model_zoo.architectures.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [2, 2, 2, 2], classes)


def wide_resnet(depth: int, width: int, classes: int) -> nn.Module:
    """RobustBench's Wide ResNet, freshly initialised."""
    zoo()
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    return WideResNet(depth, classes, width)


def entry(name: str, dataset: str, threat: str) -> dict:
    """RobustBench's own entry of a model. ValueError gives the nearest names, or the known datasets and threats."""
    models = {d.value: {t.value: names for t, names in v.items()} for d, v in zoo().utils.all_models.items()}
    if threat not in models.get(dataset, {}):
        known = "; ".join(f"{d}: {', '.join(threats)}" for d, threats in models.items())
        raise ValueError(f"RobustBench has no models for dataset={dataset!r}, threat={threat!r}; it has {known}")
    names = models[dataset][threat]
    if name not in names:
        near = difflib.get_close_matches(name, names, 5, 0.3)
        lowered = {n.lower(): n for n in names}
        near = [lowered[name.lower()]] if name.lower() in lowered else near
        raise ValueError(
            f"RobustBench has no model {name!r} for {dataset}, {threat}; nearest of its {len(names)}: {', '.join(near)}"
        )
    return names[name]


def weight_files(name: str, root: str | Path, dataset: str, threat: str) -> list[Path]:
    """Where RobustBench looks for the weights: root/dataset/threat/NAME.pt, or several files for an ensemble."""
    identity = entry(name, dataset, threat).get("gdrive_id")
    if not identity:
        raise ValueError(f"{name} has no weight file: timm or torchvision fetches it; pass the loaded model instead")
    path = Path(root) / dataset / threat.replace("_3d", "") / f"{name}.pt"
    return [Path(f"{path}_m{i}.pt") for i in range(len(identity))] if isinstance(identity, list) else [path]


def architecture(name: str, dataset: str, threat: str) -> nn.Module:
    """The network of a RobustBench entry, freshly initialised, with its own normalisation inside."""
    make = entry(name, dataset, threat).get("model")
    if make is None:
        raise ValueError(f"{name} is a timm model: build it with timm.create_model and pass it")
    with _quiet():
        return _modernise(make())


def load(name: str, root: str | Path, dataset: str, threat: str) -> nn.Module:
    """RobustBench's own loader; the weight files must exist (see `weight_files`), or it would try the network."""
    with _quiet():
        return _modernise(zoo().utils.load_model(name, root, dataset, threat))


def _modernise(model: nn.Module) -> nn.Module:
    """Put torch's SiLU in place of RobustBench's own Swish.

    The same function without weights, to 1e-6; the backward pass of Swish uses a deprecated call, which warns at every
    gradient and ends with some later torch.
    """
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if type(child).__name__ == "Swish" and type(child).__module__.startswith("robustbench."):
                setattr(module, name, nn.SiLU())
    return model
