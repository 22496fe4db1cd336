"""What training minimises: a clean term plus adversarial terms, each an inner attack and an outer loss.

    clean * CE(f(x), y)  +  distil * KL(p_0(x) || p(x))  +  sum_terms weight * E[w * outer(f(x'), .)]  +  smoothing
        +  intervals

| objective                | clean | terms                                                            |
|--------------------------|-------|------------------------------------------------------------------|
| `plain`                  | 1     | none                                                             |
| `at`                     | 0     | CE on PGD examples in delta-balls                                |
| `trades`                 | 1     | beta * KL(p(x) || p(x')), p = inf                                |
| `mart`                   | 0     | boosted CE + beta * (1 - p_y(x)) KL(p(x) || p(x')), p = inf      |
| `w_trades`               | 1     | the same with p < inf: eps_i = delta (||g_i||_s / upsilon)^(q-1) |
| `combined`               | 1     | both, each with its weight                                       |
| `water_level`            | 1     | CE at the nearest flipping point of images below the water level |
| `unlabelled`             | 0     | `trades` with the KL to the first network in place of CE         |
| `consistency`            | 1     | smoothing: an image's noisy draws agree                          |
| `macer`                  | 0     | smoothing: CE of their mean, hinge on the vote's radius          |
| `certificate`            | 1     | smoothing: what is proved of one draw, `weight` times            |
| `udr-pgd`, -trades, -mart | those | in soft balls whose multiplier follows the average cost          |
| `sr-wdro`                | 0     | `udr-pgd` by the worst weights in a KL ball                      |
| `wrm`                    | 0     | CE at the maximum of CE - gamma ||x' - x||^2                     |
| `mma`                    | 1     | CE at the nearest flipping point of images nearer than d_max     |
| `ibp`                    | 1 - w | intervals: w * CE at the worst logits that they allow            |
| `mtl_ibp`                | 0     | the same, and 1 - w times CE on PGD examples                     |

The terms, with their sources, are in `wdat.training.terms`, those of noisy draws in `wdat.training.smoothing`, of
intervals in `wdat.training.intervals`. With noise in the recipe (`Recipe.noise`) all means are over `draws` noisy
copies of every image, x + xi and x' + xi with the same xi, and inner attacks climb through the mean of their
probabilities: `at` is then SmoothAdv (Salman et al., arXiv 1906.04584), a term with p < inf its distributional version,
with budgets by image.

>>> two, through_noise = wdat.Threat("8/255"), wdat.Threat("1/4", r=2)
>>> pointwise = [wdat.plain(), wdat.at("8/255"), wdat.trades("8/255", beta=3), wdat.mart("8/255")]
>>> distributional = [wdat.w_trades(two), wdat.water_level(two), wdat.combined(two, "4/255")]
>>> provable = [wdat.ibp("2/255"), wdat.mtl_ibp("2/255", weight=0.1)]
>>> behind_noise = [wdat.consistency(weight=5.0), wdat.macer(draws=2), wdat.certificate(through_noise)]
>>> [one.name for one in pointwise + distributional[:2]]
['plain', 'at', 'trades', 'mart', 'w-trades', 'water-level']
>>> wdat.Recipe(behind_noise[0], noise=0.25, epochs=4).noise
0.25
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wdat.settings import Norm, Order, Written, reads, shown, typed
from wdat.threats.ball import Threat, pixel_norm
from wdat.threats.checks import frozen
from wdat.threats.losses import kl, worst_weights
from wdat.threats.precision import autocast
from wdat.training.intervals import Intervals
from wdat.training.smoothing import Certificate, Consistency, Macer, Smoothing
from wdat.training.terms import BOTH, OUTER, Term, WaterLevel
from wdat.training.trackers import Tracker
from wdat.zoo.noise import Averaged


@dataclass(frozen=True)
class Objective:
    """Clean weight, distillation weight (towards the network fine-tuning started from) and adversarial terms.

    Terms of weight 0 are dropped: beta = 0 is plain fine-tuning, at its cost. smoothing: a loss of an image's noisy
    draws; draws: of every image in a step. Both are for recipes with noise. intervals: a loss of the whole ball, for
    recipes without.
    """

    name: str
    terms: tuple[Term | WaterLevel, ...] = ()
    clean: float = 1.0
    distil: float = 0.0
    smoothing: Smoothing | None = None
    draws: int = 1
    intervals: Intervals | None = None

    def __post_init__(self) -> None:
        typed(self, "objective")
        if self.draws < 1:
            raise ValueError(f"draws={self.draws} noisy copies of every image; at least 1 is needed")
        object.__setattr__(self, "terms", tuple(term for term in self.terms if term.weight))
        weighed = self.clean or self.distil or self.terms or self.smoothing or self.intervals
        if self.clean < 0 or self.distil < 0 or not weighed:
            raise ValueError(
                f"weights clean={self.clean}, distil={self.distil} must be >= 0, and one weight of the objective > 0"
            )

    @property
    def needs_clean(self) -> bool:
        """Whether the outer forward includes the clean images."""
        alone = self.clean > 0 or self.distil > 0 or self.smoothing is not None
        return alone or not self.terms or any(t.outer in BOTH for t in self.terms)

    @property
    def cost(self) -> dict[str, int]:
        """Passes per image and step: input gradients, forwards alone, and full passes (with parameter gradients)."""
        inner = [t.cost for t in self.terms]
        once = {
            "gradients": sum(c["gradients"] for c in inner),
            "forwards": sum(c["forwards"] for c in inner) + (self.distil > 0),
            "full": len(self.terms) + self.needs_clean + 2 * (self.intervals is not None),
        }
        return {kind: self.draws * count for kind, count in once.items()}

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        trackers: list[Tracker | None],
        teacher: nn.Module | None = None,
        train_mode: Callable[[], object] | None = None,
        precision: str = "float32",
        noise: Tensor | None = None,
        sigma: float = 0.0,
        done: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, differentiable in the parameters, and the sums to log.

        The inner attacks see the network in eval mode; `train_mode` (default `model.train`) sets the mode of the
        outer forward. Clean and adversarial images share one forward unless batch norm would mix them. `precision`
        is that of the outer forward's layers and the teacher's; losses and parameter gradients stay in float32.
        noise (B, draws, C, H, W), of standard deviation sigma, is added to clean and adversarial images. done: share of
        the run, for what rises in it.
        """
        behind = model if noise is None else Averaged(model, noise)
        draws = 1 if noise is None else noise.shape[1]
        with frozen(model):
            found = [t.perturb(behind, x, y, index, k) for t, k in zip(self.terms, trackers, strict=True)]
        train_mode = train_mode or model.train
        train_mode()
        stacks = ([x] if self.needs_clean else []) + [f.x for f in found]
        if noise is not None:
            stacks = [(stack[:, None] + noise).flatten(0, 1) for stack in stacks]
        first, rows = stacks[0], y.repeat_interleave(draws)
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
            stacks = [torch.cat(stacks)] if len(stacks) > 1 else stacks
        with autocast(model, precision):
            outputs = [part for stack in stacks for part in model(stack).float().split(len(rows))]
        clean_logits = outputs.pop(0) if self.needs_clean else None
        loss = x.new_zeros(())
        log = {}
        if self.clean:
            loss = loss + self.clean * F.cross_entropy(clean_logits, rows)
        if self.distil:
            with torch.no_grad(), autocast(teacher, precision):
                reference = teacher(first).float()
            loss = loss + self.distil * kl(clean_logits, reference).mean()
        if self.smoothing:
            loss = loss + self.smoothing(clean_logits.unflatten(0, (len(x), draws)), y, sigma, x[0].numel()).mean()
        if self.intervals:  # after the forward that moves batch norm's statistics, which autograd keeps here
            loss = loss + self.intervals(model.eval(), x, y, done).mean()
            train_mode()
        for number, (term, f, logits) in enumerate(zip(self.terms, found, outputs, strict=True)):
            values = OUTER[term.outer](logits, rows, clean_logits, term.weight)
            if isinstance(term, Term) and term.divergence:
                values = values * worst_weights(values, term.divergence)
            values = values if f.weights is None else values * f.weights.repeat_interleave(draws)
            loss = loss + term.weight * values.mean()
            log |= {f"{number}.{key}": v.detach().double() for key, v in f.log.items()}
            moved = pixel_norm(f.x - x, term.threat.r).double()
            log[f"{number}.moved^p"] = moved.pow(1.0 if term.threat.pointwise else term.threat.p).sum()
        log["correct"] = (clean_logits if self.needs_clean else outputs[0]).argmax(1).eq(
            rows
        ).sum().double() / draws  # of the clean images where they were seen
        log["loss"] = loss.detach().double() * len(x)
        return loss, log


@reads("objective plain")
def plain(distil: float = 0.0) -> Objective:
    """Cross-entropy on clean images."""
    return Objective("plain", distil=distil)


@reads("objective at", Term, "threat")
def at(delta: Written, r: Norm = float("inf"), distil: float = 0.0, p: Order = float("inf"), **settings) -> Objective:
    """PGD adversarial training: CE on PGD examples, uniform random start. Settings: those of `Term`.

    p < inf: in balls of Wasserstein budgets.
    """
    settings = {"weight": 1.0, "outer": "ce", "inner": "ce", "start": "random", **settings}
    return Objective("at", (Term(Threat(delta, p, r), **settings),), clean=0.0, distil=distil)


@reads("objective trades", Term, "threat", "weight")
def trades(delta: Written, r: Norm = float("inf"), beta: float = 6.0, distil: float = 0.0, **settings) -> Objective:
    """Pointwise TRADES: `w_trades` with p = inf."""
    return Objective("trades", (Term(Threat(delta, float("inf"), r), beta, **settings),), distil=distil)


@reads("objective unlabelled", Term, "threat", "weight")
def unlabelled(delta: Written, r: Norm = float("inf"), beta: float = 6.0, distil: float = 1.0, **settings) -> Objective:
    """TRADES with the predictions of the network it starts from in place of labels, none of which is read."""
    return Objective("unlabelled", (Term(Threat(delta, float("inf"), r), beta, **settings),), clean=0.0, distil=distil)


@reads("objective mart", Term, "threat", "weight", "outer")
def mart(delta: Written, r: Norm = float("inf"), beta: float = 5.0, distil: float = 0.0, **settings) -> Objective:
    """MART: boosted CE on PGD examples, KL weighted by 1 - p_y(x), uniform random start. Settings: those of `Term`."""
    settings = {"inner": "ce", "start": "random", **settings}
    term = Term(Threat(delta, float("inf"), r), beta, outer="mart", **settings)
    return Objective("mart", (term,), clean=0.0, distil=distil)


@reads("objective w-trades", Term, "threat", "weight")
def w_trades(threat: Threat, beta: float = 6.0, distil: float = 0.0, **settings) -> Objective:
    """TRADES with Wasserstein budgets. Settings: those of `Term`."""
    return Objective("w-trades", (Term(threat, beta, **settings),), distil=distil)


@reads("objective combined", Term, "threat", "weight")
def combined(threat: Threat, delta: Written, beta: float = 6.0, beta_pointwise: float = 6.0, **settings) -> Objective:
    """W-TRADES plus pointwise TRADES of radius delta in the same pixel norm."""
    pointwise = Term(Threat(delta, float("inf"), threat.r), beta_pointwise, **settings)
    return Objective("combined", (Term(threat, beta, **settings), pointwise))


@reads("objective water-level", WaterLevel, "threat", "weight")
def water_level(threat: Threat, beta: float = 4.0, distil: float = 0.0, **settings) -> Objective:
    """Water-level margin training. Settings: those of `WaterLevel`."""
    return Objective("water-level", (WaterLevel(threat, beta, **settings),), distil=distil)


@reads("objective udr-pgd", Term, "threat")
def udr_pgd(delta: Written, r: Norm = float("inf"), soft: float = 0.02, **settings) -> Objective:
    """UDR-PGD: `at` in soft balls, whose multiplier follows the average cost. Settings: those of `Term`."""
    return replace(at(delta, r, soft=soft, **settings), name="udr-pgd")


@reads("objective udr-trades", Term, "threat", "weight")
def udr_trades(delta: Written, r: Norm = float("inf"), beta: float = 6.0, soft: float = 0.02, **settings) -> Objective:
    """UDR-TRADES: the same of `trades`."""
    return replace(trades(delta, r, beta, soft=soft, **settings), name="udr-trades")


@reads("objective udr-mart", Term, "threat", "weight", "outer")
def udr_mart(delta: Written, r: Norm = float("inf"), beta: float = 5.0, soft: float = 0.02, **settings) -> Objective:
    """UDR-MART: the same of `mart`."""
    return replace(mart(delta, r, beta, soft=soft, **settings), name="udr-mart")


@reads("objective sr-wdro", Term, "threat")
def sr_wdro(delta: Written, r: Norm = float("inf"), divergence: float = 0.1, **settings) -> Objective:
    """Statistically robust WDRO: `udr_pgd` by the worst weights of a batch in a KL ball, of the authors' radius."""
    return replace(udr_pgd(delta, r, divergence=divergence, **settings), name="sr-wdro")


@reads("objective wrm", Term, "threat", "penalty")
def wrm(gamma: float, r: Norm = float("inf"), **settings) -> Objective:
    """Sinha et al.'s Lagrangian: CE at the maximum of CE - gamma ||x' - x||_r^2, found from x. Settings: of `Term`."""
    return replace(at(1.0, r, p=2.0, penalty=gamma, start=0.0, **settings), name="wrm")


@reads("objective mma", WaterLevel, "threat", "weight", "level")
def mma(delta: Written, r: Norm = float("inf"), beta: float = 2.0, **settings) -> Objective:
    """MMA: CE at the nearest flipping point of images nearer than d_max = delta, and at misclassified images.

    beta is its weight against the clean CE of all images, 2 to 1 as published. Settings: those of `WaterLevel`.
    """
    threat = Threat(delta, float("inf"), r)
    return Objective("mma", (WaterLevel(threat, beta, level=threat.delta, **settings),))


@reads("objective ibp", Intervals, "threat")
def ibp(delta: Written, r: Norm = float("inf"), weight: float = 0.5, **settings) -> Objective:
    """Interval bound propagation: 1 - weight of CE on clean images. Settings: those of `Intervals`.

    Start from a trained network: short runs from scratch end with one class for all images.
    """
    found = Intervals(Threat(delta, float("inf"), r), weight, **settings)
    return Objective("ibp", clean=1 - weight, intervals=found)


@reads("objective mtl-ibp", Term, "threat", "weight")
def mtl_ibp(delta: Written, r: Norm = float("inf"), weight: float = 0.1, ramp: float = 0.5, **settings) -> Objective:
    """MTL-IBP: `ibp` with PGD adversarial training, in the same ball, in place of clean images. Settings: of `Term`."""
    found = at(delta, r, weight=1 - weight, **settings)
    return replace(found, name="mtl-ibp", intervals=Intervals(Threat(delta, float("inf"), r), weight, ramp))


@reads("objective consistency", Consistency, "weight")
def consistency(weight: float = 10.0, draws: int = 2, **settings) -> Objective:
    """Consistency regularisation of noisy draws. Settings: those of `Consistency`."""
    return Objective("consistency", smoothing=Consistency(weight, **settings), draws=draws)


@reads("objective macer", Macer, "weight")
def macer(weight: float = 12.0, draws: int = 16, **settings) -> Objective:
    """MACER: the vote's certified radius is trained. Settings: those of `Macer`."""
    return Objective("macer", clean=0.0, smoothing=Macer(weight, **settings), draws=draws)


@reads("objective certificate", Certificate, "threat", "weight")
def certificate(threat: Threat, weight: float = 4.0, draws: int = 2, clean: float = 1.0, **settings) -> Objective:
    """What is proved of one draw in the ball is trained. Settings: those of `Certificate`."""
    smoothing = Certificate(threat, weight, **settings)
    return Objective("certificate", clean=clean, smoothing=smoothing, draws=draws)


def make_objective(settings: dict) -> Objective:
    """An objective from plain values, as notebooks and the command line give them.

    {"kind": "plain" | "at" | "trades" | "mart" | "w-trades" | "combined" | "water-level" | "unlabelled" | "consistency"
    | "macer" | "certificate" | "udr-pgd" | "udr-trades" | "udr-mart" | "sr-wdro" | "wrm" | "mma" | "ibp" | "mtl-ibp",
    "delta": "8/255", "p": 2, "r": "inf", "draws": noisy copies of every image, and any further setting of that
    objective}. ValueError names what is unknown or missing.
    """
    makers = {"plain": plain, "at": at, "trades": trades, "mart": mart, "w-trades": w_trades, "combined": combined,
              "water-level": water_level, "consistency": consistency, "macer": macer,
              "certificate": certificate, "unlabelled": unlabelled, "udr-pgd": udr_pgd,
              "udr-trades": udr_trades, "udr-mart": udr_mart, "sr-wdro": sr_wdro, "wrm": wrm, "mma": mma, "ibp": ibp,
              "mtl-ibp": mtl_ibp}  # fmt: skip
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"objective is {shown(settings)}; expected a mapping, such as {{kind: w-trades, delta: 8/255}}"
        )
    rest = dict(settings)
    kind = rest.pop("kind", None)
    if not isinstance(kind, str) or kind not in makers:
        raise ValueError(f"unknown objective {kind!r}; known: {', '.join(makers)}")
    own = {} if kind in ("consistency", "macer", "certificate") else {k: rest.pop(k) for k in ("draws",) if k in rest}
    if kind in ("w-trades", "combined", "water-level", "certificate"):
        if "delta" not in rest:
            raise ValueError(f"objective {kind!r} needs delta")
        rest["threat"] = Threat(rest.pop("delta"), rest.pop("p", 2), rest.pop("r", "inf"))
        if kind == "combined":
            rest["delta"] = rest.pop("pointwise_delta", rest["threat"].written)
    try:
        return replace(makers[kind](**rest), **own)
    except TypeError as error:
        raise ValueError(f"objective {kind!r}: {error}") from None
