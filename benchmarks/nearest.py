"""Minimal distances beside other minimal-norm attacks at equal passes: `python -m benchmarks.nearest`.

After AttackBench (Cinà et al., arXiv 2404.19460): every attack queries a wrapper that counts the passes of each image,
forward and backward one each, judges every point it is asked about, and keeps the nearest misclassified one of those
within the budget; what an attack itself returns is not asked. An attack has its authors' defaults and as many steps as
the budget pays for. Optimality is theirs: the area between an attack's curve of accuracy over radius and that of the
nearest points any attack found, 1 for none and 0 for an attack that flips nothing.

The others come from AutoAttack, adv-lib and foolbox (`pip install -e .[peers]`). Foolbox's l2 FMN is left out, its
projection is wrong; adv-lib's is in. Writes nearest.json with its tables and figure beside this file, the tables into
README.md.
"""

import argparse
import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from wdat import records
from wdat.attacks.nearest import search_distances
from wdat.report import numbers
from wdat.report.canvas import drawn
from wdat.report.looks import short
from wdat.report.rows import norm_symbol
from wdat.report.table import tabled
from wdat.studies.jobs import Run, run_all
from wdat.threats.ball import parse_norm, pixel_norm, plain_number
from wdat.threats.losses import margin
from wdat.training.loop import finetune
from wdat.training.recipes import make_recipe
from wdat.zoo.data import Data, load_data
from wdat.zoo.models import load_model
from wdat.zoo.networks import build

HERE = Path(__file__).parent
BUDGETS = (10, 30, 100, 1000)  # passes an image, forward and backward
OURS, DIGITS = "wdat", "digits"
ROUNDING = 1e-6  # beyond [0, 1], which some attacks reach by adding a clamped step to the image
FAR = 10.0  # times the best distance: what an image counts for in a mean that an attack did not flip
# The settings of our search at each budget, chosen on training images: its passes are 2 steps + rivals, times
# 1 + restarts, and more for images torn between classes.
SETTINGS = {
    10: {"steps": 4, "rivals": 2}, 30: {"steps": 12, "rivals": 4}, 100: {"steps": 13, "rivals": 4, "restarts": 2},
    1000: {"steps": 20, "rivals": 9, "restarts": 18},
}  # fmt: skip
LADDER = {10: (1, 1), 30: (3, 1), 100: (5, 1), 1000: (8, 3)}  # radii that APGD-T is tried at, and rivals at each


class Spent(Exception):
    """Every image has used up its passes."""


class Watched(nn.Module):
    """A network that counts the passes of every image and keeps the nearest misclassified point within the budget.

    Attacks see images in parts, in any order, several times: a point belongs to the clean image nearest to it in l2,
    which is unambiguous where images lie further apart than what flips them.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, r: float, budget: int) -> None:
        super().__init__()
        self.model, self.clean, self.y, self.r, self.budget = model, x.flatten(1), y, r, budget
        self.best = torch.full((len(x),), math.inf)
        self.forwards, self.backwards = (torch.zeros(len(x), dtype=torch.long) for _ in range(2))

    def forward(self, points: Tensor) -> Tensor:
        """Logits; raises `Spent` once no image has a pass left."""
        if (self.passes >= self.budget).all():
            raise Spent
        flat = points.detach().flatten(1)
        image = torch.cdist(flat, self.clean).argmin(1)
        logits = self.model(points)
        self.forwards += image.bincount(minlength=len(self.y))
        away, right = pixel_norm(flat - self.clean[image], self.r), margin(logits.detach(), self.y[image]) > 0
        inside = ((flat >= -ROUNDING) & (flat <= 1 + ROUNDING)).all(1)
        counts = ~right & inside & (self.passes[image] <= self.budget)
        self.best.scatter_reduce_(0, image, torch.where(counts, away, math.inf), "amin")
        if logits.requires_grad:
            logits.register_hook(partial(self._back, image))
        return logits

    def _back(self, image: Tensor, gradient: Tensor) -> None:
        self.backwards += image[gradient.flatten(1).any(1)].bincount(minlength=len(self.y))

    @property
    def passes(self) -> Tensor:
        """Forward and backward passes of every image so far, (N,)."""
        return self.forwards + self.backwards


Attack = Callable[[nn.Module, Tensor, Tensor, int], object]


def ours(model: nn.Module, x: Tensor, y: Tensor, budget: int, r: float) -> None:
    """The search of `minimal_distances` at the settings of a budget, without the checks of its input."""
    search_distances(model, x, y, r, **SETTINGS[budget], tolerance=0.0)


def ladder(model: nn.Module, x: Tensor, y: Tensor, budget: int, r: float) -> None:
    """AutoAttack's targeted APGD at radii bisected image by image, from 8/255 (linf) or 1/2 (l2), doubled to a flip."""
    from pyautoattack.autopgd_base import APGDAttack_targeted

    rungs, rivals = LADDER[budget]
    radius = torch.full((len(x),), 8 / 255 if math.isinf(r) else 0.5)
    kept, flips = torch.zeros_like(radius), torch.full_like(radius, math.inf)
    steps = max(1, (budget - 1) // (2 * rungs * rivals) - 1)  # it begins with one pass more, at a random start
    with torch.no_grad():
        logits = model(x)
        order = logits.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
        for _ in range(rungs):
            flipped = torch.zeros(len(x), dtype=torch.bool)
            for k in range(min(rivals, logits.shape[1] - 1)):
                attack = APGDAttack_targeted(
                    model, n_iter=steps, norm="Linf" if math.isinf(r) else "L2", eps=radius.view(-1, 1, 1, 1),
                    device=x.device,
                )  # fmt: skip
                attack.init_hyperparam(x)
                attack.y_target = order[:, k]
                flipped |= ~attack.attack_single_run(x, y)[1].bool()
            kept, flips = torch.where(flipped, kept, radius), torch.where(flipped, radius, flips)
            radius = torch.where(flips.isinf(), 2 * kept, (kept + flips) / 2)


def peers(r: float) -> dict[str, Attack]:
    """Attacks of AutoAttack, adv-lib and foolbox in one pixel norm, by name."""
    import adv_lib.attacks as adv
    import foolbox

    def steps(name: str, cost: int, **settings: object) -> Attack:
        """cost: passes of a step; setting `name` says how many."""
        attack = settings.pop("attack")
        return lambda model, x, y, budget: attack(model, x, y, **{name: max(1, budget // cost)}, **settings)

    def boxed(attack: type) -> Attack:
        def run(model: nn.Module, x: Tensor, y: Tensor, budget: int) -> None:
            network = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
            attack(steps=max(1, budget // 2))(network, x, y, epsilons=None)

        return run

    found = {
        "FMN": steps("steps", 2, attack=adv.fmn, norm=r), "FAB": steps("n_iter", 12, attack=adv.fab, norm=r),
        "PDPGD": steps("num_steps", 2, attack=adv.pdpgd, norm=r),
        "trust region": steps("iter", 3, attack=adv.tr, p=r), "APGD-T, ladder": partial(ladder, r=r),
    }  # fmt: skip
    if r == 2:
        return found | {
            "DDN": steps("steps", 2, attack=adv.ddn, levels=None), "ALMA": steps("num_steps", 2, attack=adv.alma),
            "PDGD": steps("num_steps", 2, attack=adv.pdgd), "SuperDeepFool": steps("steps", 1, attack=adv.sdf),
            "DDN, foolbox": boxed(foolbox.attacks.DDNAttack),
        }  # fmt: skip
    return found | {"FMN, foolbox": boxed(foolbox.attacks.LInfFMNAttack)}


def distances(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, r: float, budget: int) -> tuple[Tensor, float]:
    """The nearest misclassified points an attack asked about within the budget, (N,), and its passes an image."""
    watched = Watched(model, x, y, r, budget).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with contextlib.suppress(Spent):
            attack(watched, x.clone(), y, budget)
    return watched.best, float(watched.passes.clamp_max(budget).double().mean())


def optimality(found: Tensor, best: Tensor) -> float:
    """AttackBench's: 1 - (area between the curves) / (area above the best curve), over radii up to its end."""
    end = best.max()
    return float(1 - (found.clamp_max(end) - best).mean() / (end - best).mean())


def compared(
    name: str, model: nn.Module, data: Data, r: float, budgets: Sequence[int], alone: bool = False
) -> list[dict]:
    """Rows of every attack and budget: optimality, mean distance over the best known, share flipped, passes."""
    with torch.no_grad():
        right = (margin(model(data.x), data.y) > 0).nonzero()[:, 0]
    x, y = data.batch(right)
    attacks = {OURS: partial(ours, r=r), **({} if alone else peers(r))}
    found = {
        (attack, budget): distances(run, model, x, y, r, budget) for attack, run in attacks.items()
        for budget in budgets
    }  # fmt: skip
    best = torch.stack([d for d, _ in found.values()]).amin(0)
    rows = []
    for (attack, budget), (d, passes) in found.items():
        nearest = torch.stack([one for (_, other), (one, _) in found.items() if other == budget]).amin(0)
        rows.append({
            "network": name, "r": plain_number(r), "n": len(x), "attack": attack, "budget": budget, "passes": passes,
            "ratio": float((d / best).clamp_max(FAR).mean()), "optimality": optimality(d, best),
            "flipped": float(d.isfinite().double().mean()), "nearest": float((d <= nearest * 1.001).double().mean()),
        })  # fmt: skip
    return rows


@tabled("nearest-benchmark")
def ratios(found: dict) -> tuple[list[dict], str]:
    """Mean distance over the best known, with the optimality in brackets; a row an attack, a column a budget."""
    table: dict[tuple, dict[str, str]] = {}
    blank = {f"{budget:,} passes": "–" for budget in sorted({row["budget"] for row in found["rows"]})}
    for row in found["rows"]:
        key = row["network"], row["r"], row["attack"]
        where = f"{row['network']}, {norm_symbol(row['r'])}"
        cells = table.setdefault(key, {"network": where, "attack": row["attack"]} | blank)
        same = [o for o in found["rows"] if (o["network"], o["r"], o["budget"]) == (*key[:2], row["budget"])]
        mark = " *" * (row["ratio"] == min(o["ratio"] for o in same))
        cells[f"{row['budget']:,} passes"] = f"{row['ratio']:.3f} ({row['optimality']:.3f}){mark}"
    n = ", ".join(f"{row['n']} ({short(row['network'])})" for row in {r["network"]: r for r in found["rows"]}.values())
    return list(table.values()), (
        f"Mean distance over the best known, images not flipped counting {FAR:g} (optimality after AttackBench); * the "
        f"nearest at this budget. Images classified correctly: {n}."
    )


def _panels(found: dict) -> list[tuple]:
    return list(dict.fromkeys((row["network"], row["r"]) for row in found["rows"]))


@drawn("nearest-benchmark", legend=5, each=_panels, height=1.9, below=0.5, sharey=True)
def curves(axis: Axes, panel: tuple, found: dict) -> None:
    """Optimality against passes, one panel a network and norm."""
    attacks = list(dict.fromkeys(row["attack"] for row in found["rows"]))
    for number, attack in enumerate(attacks):
        rows = [row for row in found["rows"] if (row["network"], row["r"], row["attack"]) == (*panel, attack)]
        style = (
            {"color": "k", "lw": 1.8}
            if attack == OURS
            else {"color": f"C{number % 10}", "lw": 0.9, "ls": "--" if number < 10 else ":"}
        )
        if rows:
            axis.plot([r["budget"] for r in rows], [r["optimality"] for r in rows], marker=".", label=attack, **style)
    axis.set(
        title=f"{short(panel[0])}, {norm_symbol(panel[1])}", xscale="log", xlabel="passes an image", ylim=(0, 1.02)
    )
    axis.set_ylabel("optimality")


def digits(epochs: int) -> tuple[nn.Module, Data]:
    """A network trained on the digits, with their test images."""
    recipe = make_recipe({"objective": {"kind": "at", "delta": "1/16", "steps": 3}, "epochs": epochs, "lr": 0.05}, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = finetune(build("digits_cnn"), load_data("digits", "train"), recipe, progress=False).model
    return model.eval(), load_data("digits", "test")


def asked(
    doc: str, place: Path, arguments: list[str] | None, budgets: Sequence[int], **switches: str
) -> argparse.Namespace:
    """What the command of a comparison was asked for: networks, images, budgets, norms, a record's place, switches."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{place.stem}", description=doc.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="of each network, drawn; the wrong ones are left out")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(budgets), choices=list(SETTINGS))
    parser.add_argument("--norms", nargs="+", default=["inf", "2"])
    parser.add_argument("--epochs", type=int, default=10, help="that the network of the digits is trained")
    parser.add_argument("--cards", type=Path, nargs="*", default=[], help="third-party networks beside the digits")
    parser.add_argument("--weights", help="folder of their weights")
    parser.add_argument("--test-images", help="folder of their test images")
    parser.add_argument("--add", action="store_true", help="keep what the record has of other networks")
    parser.add_argument("--jobs", type=int, default=0, help="norms at the same time; 0: as many as fit")
    for name, said in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=said)
    parser.add_argument("--out", type=Path, default=place.with_suffix(".json"))
    return parser.parse_args(arguments)


def _measured(
    card: Path | None, r: float, chosen: argparse.Namespace, compare: Callable[..., list[dict]]
) -> list[dict]:
    """Rows of one network, a card's or (None) that of the digits, in one norm."""
    if card is None:
        name, (model, data) = DIGITS, digits(chosen.epochs)
    else:
        name, data = card.stem, load_data(chosen.test_images, "test")
        model = load_model(str(card), root=chosen.weights)
    return compare(name, model.requires_grad_(False), data.take(min(chosen.images, len(data)), seed=0), r)


def measured(kind: str, chosen: argparse.Namespace, compare: Callable[..., list[dict]]) -> None:
    """Rows of every network and norm asked for, written to the record after each network."""
    found, asked_of = {}, {}  # by network: rows, and what the command said of it
    if chosen.add and chosen.out.is_file():
        record = records.read(chosen.out, kind)
        asked_of = record["config"]
        for row in record["results"]["rows"]:
            found.setdefault(row["network"], []).append(row)
    for card in [None] * (DIGITS not in found) + chosen.cards:
        name = card.stem if card else DIGITS
        own = {"card": card, "chosen": chosen, "compare": compare}
        runs = [Run(f"{name}, {norm}", _measured, {**own, "r": parse_norm(norm)}) for norm in chosen.norms]
        found[name] = [row for rows in run_all(runs, chosen.jobs, desc=name) for row in rows]
        asked_of[name] = {key: getattr(chosen, key) for key in ("images", "budgets", "norms", "epochs")}
        records.write(chosen.out, kind, {"rows": list(chain(*found.values()))}, asked_of, "cpu")


def main(arguments: list[str] | None = None) -> None:
    """The command; see --help."""
    chosen = asked(__doc__, HERE / "nearest.py", arguments, BUDGETS, alone="without adv-lib and foolbox")
    compare = partial(compared, budgets=sorted(chosen.budgets), alone=chosen.alone)
    measured("nearest-benchmark", chosen, compare)
    print(ratios(chosen.out).markdown())
    curves(chosen.out)
    if chosen.out.parent == HERE:
        numbers.fill(HERE / "README.md")


if __name__ == "__main__":
    main()
