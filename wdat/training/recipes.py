"""Recipes: everything a fine-tuning run depends on besides the network and the data.

Source: arXiv 2502.09352; defaults of TRADES (arXiv 1901.08573).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from wdat.settings import check_names, shown, typed
from wdat.threats import joint
from wdat.threats.checks import device_of
from wdat.threats.inputs import copied, plain_weights
from wdat.threats.precision import TRAINING_PRECISIONS
from wdat.threats.seeds import derive_seed
from wdat.training.compression import Compression
from wdat.training.layerwise import Optimiser
from wdat.training.objectives import Objective, make_objective
from wdat.training.schedules import Schedule, get_schedule
from wdat.training.terms import WaterLevel
from wdat.training.trackers import Rule, Tracker
from wdat.zoo.data import Data
from wdat.zoo.noise import Averaged

INITS = ("none", "perturb", "rerandomise", "scratch")
LAYERS = ("all", "last")


@dataclass(frozen=True)
class Recipe:
    """Everything a fine-tuning run depends on besides the network and the data.

    Args:
        objective: see `wdat.training.objectives`; or a mapping as for `make_objective`.
        epochs, batch_size: as usual; the last, smaller batch is kept.
        lr, schedule: base learning rate and a name from `wdat.training.schedules.SCHEDULES`.
        accumulate: micro-batches a step is split into, for networks that do not fit at once; the step is that of the
            whole batch but for rounding and the inner attacks' random starts. What sees a micro-batch only: batch norm
            in training mode, and what is tracked batch by batch (the upsilon rules "batch", "ema" and "memory", the
            water level), which observes each in turn.
        precision: "bfloat16" runs the layers of the outer forward and backward pass in it (all but the first and last,
            see `threats.precision.autocast`); weights, their gradients and the losses stay in float32. That of the
            inner attacks is a setting of their terms.
        momentum, weight_decay: of SGD (decay 0 switches it off).
        clip: largest l2 norm of a step's gradient over all weights, longer ones are scaled down to it; 0: no limit. The
            first steps of an adversarial objective from a sharp network are where a run diverges.
        init: "none", "perturb" (all weights, Gaussian noise of `init_scale` times each tensor's root mean square) or
            "rerandomise" (the last layer's own initialisation), "scratch" (every layer's: nothing of the network is
            kept but its shape and normalisation). A trained network sits at a stationary point.
        layers: "all", or "last" for the last linear layer, the rest (batch norm too) held.
        upsilon: how upsilon is kept, a `wdat.training.trackers.Rule` or a mapping of its fields.
        augment: largest shift in pixels of a random crop (zero padding), together with `flip`.
        flip: mirror half of the images.
        noise: standard deviation of Gaussian noise added to every image of a step, unclipped, for `wdat.Randomised` of
            the same sigma (Cohen et al., arXiv 1902.02918); 0: none. Adversarial images are found through it, see
            `wdat.training.objectives`. Training and validation accuracy are then those of one draw.
        optimiser: a `wdat.training.layerwise.Optimiser` or a mapping of its fields: layer-wise steps for large
            batches, warm-up, the rate's scaling with the batch.
        compression: of gradients between workers, a `wdat.training.compression.Compression` or a mapping.
        seed: of order, augmentation, noise, initialisation.

    Every setting is read by its type (`wdat.settings`); ValueError for one that does not fit.

    >>> wdat.Recipe(wdat.w_trades(wdat.Threat("1/16")), epochs=5).objective.name
    'w-trades'
    """

    objective: Objective
    epochs: int = 20
    batch_size: int = 128
    accumulate: int = 1
    precision: str = "float32"
    lr: float = 0.01
    schedule: str | Schedule = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 0.0
    init: str = "none"
    init_scale: float = 0.05
    layers: str = "all"
    upsilon: Rule = field(default_factory=Rule)
    augment: int = 0
    flip: bool = False
    noise: float = 0.0
    optimiser: Optimiser = field(default_factory=Optimiser)
    compression: Compression = field(default_factory=Compression)
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            object.__setattr__(self, "objective", make_objective(self.objective))
        typed(self, "recipe")
        if self.init not in INITS or self.layers not in LAYERS:
            raise ValueError(f"init={self.init!r} must be one of {INITS}, layers={self.layers!r} one of {LAYERS}")
        if self.epochs < 0 or self.batch_size < 1 or not self.lr >= 0:
            raise ValueError(f"epochs={self.epochs}, lr={self.lr} must be >= 0, batch_size={self.batch_size} >= 1")
        if not 1 <= self.accumulate <= self.batch_size or self.precision not in TRAINING_PRECISIONS:
            raise ValueError(
                f"accumulate={self.accumulate} must be from 1 to the batch size, {self.batch_size}, and precision="
                f"{self.precision!r} one of {', '.join(TRAINING_PRECISIONS)}"
            )
        if self.augment < 0 or min(self.clip, self.weight_decay, self.init_scale) < 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"augment={self.augment}, a shift in pixels, clip={self.clip}, weight_decay={self.weight_decay} and "
                f"init_scale={self.init_scale} must be >= 0, momentum={self.momentum} in [0, 1)"
            )
        if not 0 <= self.noise <= 10 or (self.noise and any(isinstance(t, WaterLevel) for t in self.objective.terms)):
            raise ValueError(
                f"noise={self.noise:g} must be a standard deviation in [0, 10], and 0 with the objective water-level, "
                "whose nearest points have no meaning behind noise: train with noise by certificate, say"
            )
        if self.noise and self.objective.intervals:
            raise ValueError(f"noise={self.noise:g} must be 0 with intervals, which are of the network without noise")
        if not self.noise and (self.objective.draws > 1 or self.objective.smoothing):
            raise ValueError(
                f"objective {self.objective.name!r} with draws={self.objective.draws} noisy copies of every image "
                "needs the noise's standard deviation: set noise=0.25, say"
            )
        get_schedule(self.schedule)

    @property
    def micro_batch(self) -> int:
        """Images that visit the network at a time."""
        return -(-self.batch_size // self.accumulate)

    def micro_batches(self, n: int) -> set[int]:
        """Sizes of the micro-batches that n images are trained in."""
        steps = {min(self.batch_size, n), n % self.batch_size} - {0}
        return {size for step in steps for size in (min(self.micro_batch, step), step % self.micro_batch) if size}

    def draw(self, x: Tensor) -> list[Tensor]:
        """The noise of a step for images (B, C, H, W): [(B, draws, C, H, W)], or nothing, from torch's generator."""
        if not self.noise:
            return []
        shape = (len(x), self.objective.draws, *x.shape[1:])
        return [self.noise * joint.drawn(partial(torch.randn, device=x.device), shape)]

    def behind(self, network: nn.Module, train: Data) -> nn.Module:
        """The network whose sensitivity budgets come from: with noise, the mean of the same draws at every refresh."""
        if not self.noise:
            return network
        seeded = torch.Generator().manual_seed(derive_seed(self.seed, -1))
        drawn = torch.randn(self.objective.draws, *train.pixels.shape[1:], generator=seeded)
        return Averaged(network, self.noise * drawn.to(device_of(network)))

    def select(self, network: nn.Module) -> None:
        """Let autograd follow the weights that are trained, and no others."""
        network.requires_grad_(self.layers == "all")
        if self.layers == "last":
            last_layer(network).requires_grad_(True)

    def trackers(self, n: int) -> list[Tracker | None]:
        """The tracked scalar of every term that needs one, for n training images."""
        rules = {"upsilon": self.upsilon, "distance": Rule("memory"), "softness": Rule("batch")}
        return [Tracker(rules[t.tracked], t.threat, n) if t.tracked else None for t in self.objective.terms]


def make_recipe(settings: dict, seed: int) -> Recipe:
    """A `Recipe` from plain values, as YAML gives them: numbers may be text. ValueError names what does not fit."""
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"recipe is {shown(settings)}; expected a mapping, such as {{objective: {{kind: plain}}, lr: 0.01}}"
        )
    check_names(settings, [f.name for f in fields(Recipe) if f.name != "seed"], "recipe")
    return Recipe(**{"objective": {}, **settings}, seed=seed)


def last_layer(model: nn.Module) -> nn.Linear:
    """The last `nn.Linear` in definition order. ValueError if there is none."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError('no nn.Linear in the model: layers="last" and init="rerandomise" need one')
    return linear[-1]


@torch.no_grad()
def check_single_images(model: nn.Module, recipe: Recipe, train: Data) -> None:
    """Raise ValueError if a micro-batch holds an image alone and batch norm has nothing else to average over."""
    n = len(train)
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if recipe.layers != "all" or 1 not in recipe.micro_batches(n) or not any(norms):
        return
    try:
        copied(model).train()(train.batch(torch.arange(1))[0].to(device_of(model)))
    except ValueError as error:
        sizes = range(recipe.batch_size + 1, recipe.batch_size + n + 2)
        fits = next((size for size in sizes if 1 not in replace(recipe, batch_size=size).micro_batches(n)), None)
        remedy = f"set batch_size={fits}" if fits else "pass at least 2 images"
        raise ValueError(
            f"{n} images in batches of {recipe.batch_size}, micro-batches of {recipe.micro_batch}, leave one image "
            f'alone, and batch norm needs two ({str(error)[:80]}); {remedy} or layers="last"'
        ) from error


def _redraw(layer: nn.Module) -> None:
    """A layer's own initialisation; of weights that are computed (a mask, weight norm), of what they come from."""
    hooks = any(isinstance(hook, WeightNorm | SpectralNorm) for hook in layer._forward_pre_hooks.values())
    if not (hooks or parametrize.is_parametrized(layer)):
        layer.reset_parameters()
        return
    fresh = plain_weights(layer)
    fresh.reset_parameters()
    try:
        if hooks:
            raise NotImplementedError("a hook")
        for name, drawn in fresh.named_parameters():
            if parametrize.is_parametrized(layer, name):
                setattr(layer, name, drawn.detach())
            else:
                getattr(layer, name).copy_(drawn)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the weight of a {type(fresh).__name__} is computed by what can not take on a freshly drawn one "
            f"({' '.join(str(error).split())[:60]}); pass plain_weights(model), of wdat.threats.inputs"
        ) from error


@torch.no_grad()
def initialise(model: nn.Module, init: str, scale: float) -> None:
    """Perturb or re-randomise in place, from torch's global generator; see `Recipe`."""
    if init == "scratch":
        layers = [m for m in model.modules() if hasattr(m, "reset_parameters")]
        known = {id(p) for layer in layers for p in layer.parameters()}
        if left := [name for name, p in model.named_parameters() if id(p) not in known]:
            raise ValueError(f'init="scratch": {left[0]} is of no layer that draws its own weights (reset_parameters)')
        for layer in layers:
            _redraw(layer)
    elif init == "rerandomise":
        _redraw(last_layer(model))
    elif init == "perturb":
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * weight.square().mean().sqrt() * scale)
