"""What training minimises: a clean term plus adversarial terms, each an inner attack and an outer loss.

    clean * CE(f(x), y)  +  distil * KL(p_0(x) || p(x))  +  sum_terms weight * E[w * outer(f(x'), .)]

| objective                | clean | terms                                                            |
|--------------------------|-------|------------------------------------------------------------------|
| `plain`                  | 1     | none                                                             |
| `at`                     | 0     | CE on PGD examples in delta-balls                                |
| `trades`                 | 1     | beta * KL(p(x) || p(x')), p = inf                                |
| `mart`                   | 0     | boosted CE + beta * (1 - p_y(x)) KL(p(x) || p(x')), p = inf      |
| `w_trades`               | 1     | the same with p < inf: eps_i = delta (||g_i||_s / upsilon)^(q-1) |
| `combined`               | 1     | both, each with its weight                                       |
| `water_level`            | 1     | CE at the nearest flipping point of images below the water level |

The terms, with their sources, are in `wdat.training.terms`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wdat.settings import Norm, Written, reads, typed
from wdat.threats.ball import Threat, pixel_norm
from wdat.threats.checks import frozen
from wdat.threats.losses import kl
from wdat.threats.precision import autocast
from wdat.training.terms import BOTH, OUTER, Term, WaterLevel
from wdat.training.trackers import Tracker


@dataclass(frozen=True)
class Objective:
    """Clean weight, distillation weight (towards the network fine-tuning started from) and adversarial terms.

    Terms of weight 0 are dropped: beta = 0 is plain fine-tuning, at its cost.
    """

    name: str
    terms: tuple[Term | WaterLevel, ...] = ()
    clean: float = 1.0
    distil: float = 0.0

    def __post_init__(self) -> None:
        typed(self, "objective")
        object.__setattr__(self, "terms", tuple(term for term in self.terms if term.weight))
        if self.clean < 0 or self.distil < 0 or not (self.clean or self.distil or self.terms):
            raise ValueError(
                f"weights clean={self.clean}, distil={self.distil} must be >= 0, and one weight of the objective > 0"
            )

    @property
    def needs_clean(self) -> bool:
        """Whether the outer forward includes the clean images."""
        return self.clean > 0 or self.distil > 0 or any(t.outer in BOTH for t in self.terms)

    @property
    def cost(self) -> dict[str, int]:
        """Passes per image and step: input gradients, forwards alone, and full passes (with parameter gradients)."""
        inner = [t.cost for t in self.terms]
        return {
            "gradients": sum(c["gradients"] for c in inner),
            "forwards": sum(c["forwards"] for c in inner) + (self.distil > 0),
            "full": len(self.terms) + self.needs_clean,
        }

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, differentiable in the parameters, and the sums to log.

        The inner attacks see the network in eval mode; `train_mode` (default `model.train`) sets the mode of the
        outer forward. Clean and adversarial images share one forward unless batch norm would mix them. `precision`
        is that of the outer forward's layers and the teacher's; losses and parameter gradients stay in float32.
        """
        with frozen(model):
            found = [t.perturb(model, x, y, index, k) for t, k in zip(self.terms, trackers, strict=True)]
        (train_mode or model.train)()
        stacks = ([x] if self.needs_clean else []) + [f.x for f in found]
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
            stacks = [torch.cat(stacks)] if len(stacks) > 1 else stacks
        with autocast(model, precision):
            outputs = [part for stack in stacks for part in model(stack).float().split(len(x))]
        clean_logits = outputs.pop(0) if self.needs_clean else None
        loss = x.new_zeros(())
        log = {}
        if self.clean:
            loss = loss + self.clean * F.cross_entropy(clean_logits, y)
        if self.distil:
            with torch.no_grad(), autocast(teacher, precision):
                reference = teacher(x).float()
            loss = loss + self.distil * kl(clean_logits, reference).mean()
        for number, (term, f, logits) in enumerate(zip(self.terms, found, outputs, strict=True)):
            values = OUTER[term.outer](logits, y, clean_logits, term.weight)
            values = values if f.weights is None else values * f.weights
            loss = loss + term.weight * values.mean()
            log |= {f"{number}.{key}": v.detach().double() for key, v in f.log.items()}
            moved = pixel_norm(f.x - x, term.threat.r).double()
            log[f"{number}.moved^p"] = moved.pow(1.0 if term.threat.pointwise else term.threat.p).sum()
        log["correct"] = (
            (clean_logits if self.needs_clean else outputs[0]).argmax(1).eq(y).sum().double()
        )  # of the clean images where they were seen
        log["loss"] = loss.detach().double() * len(x)
        return loss, log


@reads("objective plain")
def plain(distil: float = 0.0) -> Objective:
    """Cross-entropy on clean images."""
    return Objective("plain", distil=distil)


@reads("objective at", Term, "threat")
def at(delta: Written, r: Norm = float("inf"), distil: float = 0.0, **settings) -> Objective:
    """PGD adversarial training: CE on PGD examples, uniform random start. Settings: those of `Term`."""
    settings = {"weight": 1.0, "outer": "ce", "inner": "ce", "start": "random", **settings}
    return Objective("at", (Term(Threat(delta, float("inf"), r), **settings),), clean=0.0, distil=distil)


@reads("objective trades", Term, "threat", "weight")
def trades(delta: Written, r: Norm = float("inf"), beta: float = 6.0, distil: float = 0.0, **settings) -> Objective:
    """Pointwise TRADES: `w_trades` with p = inf."""
    return Objective("trades", (Term(Threat(delta, float("inf"), r), beta, **settings),), distil=distil)


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


def make_objective(settings: dict) -> Objective:
    """An objective from plain values, as notebooks and the command line give them.

    {"kind": "plain" | "at" | "trades" | "mart" | "w-trades" | "combined" | "water-level", "delta": "8/255", "p": 2,
    "r": "inf", and any further setting of that objective}. ValueError names what is unknown or missing.
    """
    makers = {"plain": plain, "at": at, "trades": trades, "mart": mart, "w-trades": w_trades, "combined": combined,
              "water-level": water_level}  # fmt: skip
    if not isinstance(settings, Mapping):
        raise ValueError(f"objective is {settings!r}; expected a mapping, such as {{kind: w-trades, delta: 8/255}}")
    rest = dict(settings)
    kind = rest.pop("kind", None)
    if kind not in makers:
        raise ValueError(f"unknown objective {kind!r}; known: {', '.join(makers)}")
    if kind in ("w-trades", "combined", "water-level"):
        if "delta" not in rest:
            raise ValueError(f"objective {kind!r} needs delta")
        rest["threat"] = Threat(rest.pop("delta"), rest.pop("p", 2), rest.pop("r", "inf"))
        if kind == "combined":
            rest["delta"] = rest.pop("pointwise_delta", rest["threat"].written)
    try:
        return makers[kind](**rest)
    except TypeError as error:
        raise ValueError(f"objective {kind!r}: {error}") from None
