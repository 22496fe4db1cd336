"""Distributional attacks at equal passes: `python -m benchmarks.distributional`.

What attacks leave of the W_p accuracy (p = 1 and 2) at one radius delta, each with the same number of passes an image,
forward and backward one each:

- `wdat`: the search for minimal distances, then their optimal allocation;
- `WDA++` (Le et al. 2025, arXiv 2510.10000; no radius of its own): large steps, each towards the class whose logit it
  raises highest, until the prediction changes, then bisection of the last step; allocated as ours, which is theirs too;
- `WDA` (same source): steps of the margin towards one class, found by a step towards each, inside a ball about every
  image. A ball of k delta, put on a random share k^-p of the images, is a distributional attack: its best k counts;
- `PGD`: ReDLR's gradient in the same balls, mixed likewise (`wdat.accuracy.allocation.mixture_bound`);
- `W-PGD` (arXiv 2306.09844): one joint budget; the better of ReDLR and cross-entropy. Defined for p > 1.

WDA++ has no good setting at every budget: of its step sizes and numbers of classes the best in hindsight counts, for
every number of the table. Written from the public description and the authors' published settings.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.nearest import asked, distances, measured, ours
from wdat.accuracy.allocation import accuracy_curve, mixture_bound
from wdat.attacks.pgd import attack
from wdat.report import numbers
from wdat.report.rows import norm_symbol
from wdat.report.table import tabled
from wdat.threats.ball import Threat, per_image, plain_number, project
from wdat.threats.losses import margin
from wdat.zoo.data import Data

HERE = Path(__file__).parent
BUDGETS = (30, 100, 1000)  # passes an image, forward and backward
ORDERS = (1.0, 2.0)
DELTAS = {"digits": {"inf": "1/16", "2": "1/4"}}  # of networks by name
COMMON = {"inf": "1/255", "2": "1/8"}
BALLS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # radii of pointwise attacks that are mixed, in units of delta
SIZES, CLASSES = (0.5, 1.0, 2.0, 5.0), (3, 9)  # of WDA++: steps in units of delta, classes looked at
BISECTIONS = 10  # of WDA++


def rivals(model: nn.Module, x: Tensor, y: Tensor, count: int) -> Tensor:
    """The wrong classes of highest logit, (N, count)."""
    logits = model(x).detach()
    return logits.scatter(1, y[:, None], -torch.inf).topk(min(count, logits.shape[1] - 1)).indices


def ascent(model: nn.Module, x: Tensor, y: Tensor, classes: Tensor, r: float) -> list[Tensor]:
    """Directions of r-norm 1 in which z_k - z_y rises most at x, one for each column k of classes (N, K)."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        gains = logits.gather(1, classes) - logits.gather(1, y[:, None])
        found = [
            torch.autograd.grad(gain.sum(), leaf, retain_graph=k + 1 < gains.shape[1])[0]
            for k, gain in enumerate(gains.unbind(1))
        ]
    return [Threat(1.0, torch.inf, r).direction(gradient) for gradient in found]


def wda(model: nn.Module, x: Tensor, y: Tensor, budget: int, *, r: float, radius: float) -> None:
    """WDA in balls of one radius, at its authors' steps: 2.5 (l2: 1.5) radii over their number, 2 to try a class."""

    def stepped(here: Tensor, direction: Tensor, size: float) -> Tensor:
        moved = here + size * direction - x
        return (x + project(moved, torch.full((len(x),), radius), r)).clamp(0, 1)

    classes = rivals(model, x, y, max(1, budget // 6))
    tried = [stepped(x, direction, 2 * radius) for direction in ascent(model, x, y, classes, r)]
    raised = torch.stack([model(t).detach().gather(1, classes[:, k : k + 1])[:, 0] for k, t in enumerate(tried)], 1)
    chosen, here = classes.gather(1, raised.argmax(1, keepdim=True)), x
    steps = max(1, (budget - 3 - 2 * classes.shape[1]) // 2)
    for _ in range(steps):
        (direction,) = ascent(model, here, y, chosen, r)
        here = stepped(here, direction, (1.5 if r == 2 else 2.5) * radius / steps)
    model(here)


def wda_pp(model: nn.Module, x: Tensor, y: Tensor, budget: int, *, r: float, size: float, count: int) -> None:
    """WDA++'s search for a near flip: steps of r-norm `size`, looking at `count` classes."""
    classes = rivals(model, x, y, count)
    here, after, left = x.clone(), x.clone(), torch.arange(len(x))
    for _ in range(max(1, (budget - 1 - BISECTIONS) // (1 + 2 * classes.shape[1]))):
        own, target = classes[left], y[left]
        tried = [(here[left] + size * direction).clamp(0, 1) for direction in ascent(model, here[left], target, own, r)]
        logits = torch.stack([model(t).detach() for t in tried], 1)  # (n, K, classes)
        best = logits.gather(2, own[..., None])[..., 0].argmax(1)
        each = torch.arange(len(left))
        moved, wrong = torch.stack(tried, 1)[each, best], margin(logits[each, best], target) <= 0
        after[left[wrong]] = moved[wrong]
        here[left[~wrong]] = moved[~wrong]
        left = left[~wrong]
        if not len(left):
            break
    flipped = torch.ones(len(x), dtype=torch.bool).index_fill(0, left, False).nonzero()[:, 0]
    low, high = torch.zeros(len(flipped)), torch.ones(len(flipped))
    for _ in range(BISECTIONS * bool(len(flipped))):
        middle = (low + high) / 2
        point = here[flipped] + per_image(middle, x) * (after[flipped] - here[flipped])
        wrong = margin(model(point).detach(), y[flipped]) <= 0
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)


def compared(name: str, model: nn.Module, data: Data, r: float, budgets: Sequence[int]) -> list[dict]:
    """Rows of every attack, budget and order: the accuracy left of all images, and the passes spent on a right one."""
    written = DELTAS.get(name, COMMON)[str(plain_number(r)).removesuffix(".0")]
    delta = Threat(written, 2, r).delta
    x, y = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        right = margin(model(x), y) > 0
    own, labels, wrong = x[right], y[right], torch.zeros(int((~right).sum()))
    clean = float(right.double().mean())

    def near(run: object, budget: int) -> tuple[Tensor, float]:
        found, passes = distances(run, model, own, labels, r, budget)
        return torch.cat([found, wrong]), passes

    def mixed(radii: Sequence[float], accuracies: Sequence[float], p: float) -> float:
        """Of pointwise accuracies; a larger ball holds what was found in a smaller one."""
        falling = torch.tensor([clean, *accuracies], dtype=torch.float64).cummin(0).values
        return float(mixture_bound(torch.tensor([0.0, *radii], dtype=torch.float64), falling, delta, p))

    rows = []
    for budget in budgets:
        balls, steps = [k * delta for k in BALLS], max(1, (budget - 1) // 2)
        allocated = {"wdat": [near(partial(ours, r=r), budget)], "WDA++": [
            near(partial(wda_pp, r=r, size=size * delta, count=count), budget)
            for size, count in itertools.product(SIZES, CLASSES)
        ]}  # fmt: skip
        inside = [near(partial(wda, r=r, radius=radius), budget) for radius in balls]
        wda_left = [
            float((d > radius * (1 + 1e-5)).double().mean()) for (d, _), radius in zip(inside, balls, strict=True)
        ]
        pgd_left = [attack(model, x, y, Threat(radius, torch.inf, r), steps=steps).accuracy for radius in balls]
        for p in ORDERS:
            found = {
                name: (min(float(accuracy_curve(d, delta, p)) for d, _ in its), max(passes for _, passes in its))
                for name, its in allocated.items()
            }
            found["WDA"] = mixed(balls, wda_left, p), max(passes for _, passes in inside)
            found["PGD"] = mixed(balls, pgd_left, p), float(2 * steps + 1)
            if p > 1:
                runs = [attack(model, x, y, Threat(delta, p, r), steps=steps, loss=loss) for loss in ("redlr", "ce")]
                found["W-PGD"] = min(run.accuracy for run in runs), float(2 * steps + 1)
            rows += [
                {"network": name, "r": plain_number(r), "delta": delta, "written": written, "n": len(x), "p": p,
                 "attack": kind, "budget": budget, "passes": passes, "accuracy": left, "clean": clean}
                for kind, (left, passes) in found.items()
            ]  # fmt: skip
    return rows


@tabled("distributional-benchmark")
def left(found: dict) -> tuple[list[dict], str]:
    """Accuracy left, a row an attack, a column an order and budget."""
    table: dict[tuple, dict[str, str]] = {}
    columns = [(p, b) for p in ORDERS for b in dict.fromkeys(row["budget"] for row in found["rows"])]
    for row in found["rows"]:
        where = f"{row['network']}, {norm_symbol(row['r'])}, δ = {row['written']}"
        blank = {f"p = {p:g}, {b:,} passes": "–" for p, b in columns}
        cells = table.setdefault((where, row["attack"]), {"network": where, "attack": row["attack"]} | blank)
        key = ("network", "r", "budget", "p")
        same = [other["accuracy"] for other in found["rows"] if all(other[k] == row[k] for k in key)]
        mark = " *" * (row["accuracy"] == min(same))
        cells[f"p = {row['p']:g}, {row['budget']:,} passes"] = f"{100 * row['accuracy']:.1f}{mark}"
    n = ", ".join(dict.fromkeys(str(row["n"]) for row in found["rows"]))
    return list(table.values()), f"W\\_p accuracy left, %, an upper bound; * the lowest at this budget. n = {n} images."


def main(arguments: list[str] | None = None) -> None:
    """The command; see --help."""
    chosen = asked(__doc__, HERE / "distributional.py", arguments, BUDGETS)
    measured("distributional-benchmark", chosen, partial(compared, budgets=sorted(chosen.budgets)))
    print(left(chosen.out).markdown())
    if chosen.out.parent == HERE:
        numbers.fill(HERE / "README.md")


if __name__ == "__main__":
    main()
