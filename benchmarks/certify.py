"""Counting draws against a plain loop and against the published procedure: `python -m benchmarks.certify`.

The procedure of Cohen, Rosenfeld and Kolter (arXiv 1902.02918, figure "certify"): image by image, n0 draws select a
class, n further draws are counted, and the Clopper-Pearson lower end of its share gives a radius or an abstention;
n0 = 100, batches of 1,000, a failure probability of 0.001 and, in its own size, n = 100,000 are the defaults of the
authors' implementation (github.com/locuslab/smoothing), as is bringing every batch's answers to the host. All get the
same draws of every image and the same confidence: many images with few draws, and few with as many as published.
Times are those of the process, the ratios within a round, their median over the rounds.

Writes certify.json and its tables beside this file, and the tables into README.md.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from benchmarks.counting import Clock, timed
from wdat import records
from wdat.accuracy.allocation import accuracy_curve
from wdat.randomised.certify import summary
from wdat.randomised.counts import Counts, count
from wdat.report import numbers
from wdat.report.rows import percent
from wdat.report.table import tabled
from wdat.threats.ball import Threat
from wdat.training.loop import finetune
from wdat.training.recipes import make_recipe
from wdat.zoo.data import Data, load_data
from wdat.zoo.models import load_model
from wdat.zoo.networks import build

HERE = Path(__file__).parent
SELECT, CONFIDENCE = 100, 0.999  # n0; of each image in the published procedure


@torch.no_grad()
def answers(model: nn.Module, x: Tensor, sigma: float, draws: int, batch: int) -> Tensor:
    """How often each class came among noisy copies of one image (C, H, W): int64 (classes,)."""
    found = 0
    for start in range(0, draws, batch):
        copies = x.expand(min(batch, draws - start), *x.shape)
        votes = model(copies + sigma * torch.randn_like(copies)).argmax(1)
        found = found + votes.cpu().bincount(minlength=10)
    return found


def plain(model: nn.Module, data: Data, sigma: float, draws: int, batch: int) -> Tensor:
    """Right answers of every image, in a loop over images: what one writes first."""
    return torch.stack([answers(model, x, sigma, draws, batch)[y] for x, y in zip(data.x, data.y, strict=True)])


def published(model: nn.Module, data: Data, sigma: float, draws: int, batch: int) -> Tensor:
    """Certified l2 radii of the vote (N,), 0 where it abstains or is wrong, from n0 + n = draws draws an image."""
    radii = []
    for x, y in zip(data.x, data.y, strict=True):
        top = int(answers(model, x, sigma, SELECT, batch).argmax())
        k, n = int(answers(model, x, sigma, draws - SELECT, batch)[top]), draws - SELECT
        low = float(beta.ppf(1 - CONFIDENCE, k, n - k + 1)) if k else 0.0
        radii.append(sigma * float(norm.ppf(low)) if low > 0.5 and top == int(y) else 0.0)
    return torch.tensor(radii, dtype=torch.float64)


def measure(model: nn.Module, data: Data, sigma: float, draws: int, batch: int, rounds: int) -> list[dict]:
    """Draws a second of the three, and how many times the plain loop's time they take."""
    work: dict[str, Callable] = {
        "plain loop over images": plain, "published procedure": published,
        "counts": lambda model, data, sigma, draws, batch: count(
            model, data, sigma, draws=draws, batch_size=batch, progress=False
        ),
    }  # fmt: skip
    clock, laps = Clock(torch.device("cpu")), []
    for _ in range(rounds):
        laps.append(
            {name: timed(clock, lambda f=f: f(model, data, sigma, draws, batch))[1] for name, f in work.items()}
        )
    return [
        {
            "work": name, "draws_per_second": len(data) * draws / statistics.median(lap[name] for lap in laps),
            "ratio": statistics.median(lap[name] / lap["plain loop over images"] for lap in laps),
        }
        for name in work
    ]  # fmt: skip


def curves(model: nn.Module, data: Data, sigma: float, draws: int, batch: int, deltas: list[str]) -> list[dict]:
    """Certified at equal draws: pointwise (p = inf) and in W_2, by the published radii, our vote and one draw."""
    radii = published(model, data, sigma, draws, batch)
    found: Counts = count(model, data, sigma, draws=draws, batch_size=batch, progress=False)
    rows = []
    for p in ("inf", 2):
        threats = [Threat(delta, p, 2) for delta in deltas]
        for threat, own in zip(threats, summary(found, threats, CONFIDENCE)["threats"], strict=True):
            rows.append({
                "threat": threat.describe(), "published": float(accuracy_curve(radii, threat.delta, threat.p)),
                "vote": own["vote"], "one_draw": own["lower"],
            })  # fmt: skip
    return rows


def compare(
    model: nn.Module, data: Data, sigma: float, draws: int, batch: int, rounds: int, deltas: list[str]
) -> dict:  # fmt: skip
    """Speeds and certificates with so many draws of these images."""
    given = (model, data, sigma, draws, batch)
    return {"n": len(data), "draws": draws, "speeds": measure(*given, rounds), "curves": curves(*given, deltas)}


@tabled("certify-benchmark")
def speeds(found: dict) -> tuple[list[dict], str]:
    """Draws a second, and how long a draw takes."""
    rows = [
        {
            "images": f"{size['n']}", "draws of each": f"{size['draws']:,}", "work": row["work"],
            "draws a second": f"{row['draws_per_second']:,.0f}", "µs a draw": f"{1e6 / row['draws_per_second']:.1f}",
            "time, to the loop": f"{row['ratio']:.2f}",
        }
        for size in found["sizes"] for row in size["speeds"]
    ]  # fmt: skip
    return rows, f"{found['network']}, batches of {found['batch']}, one thread."


@tabled("certify-benchmark", "curves")
def proved(found: dict) -> tuple[list[dict], str]:
    """What is certified at equal draws."""
    rows = [
        {
            "images": f"{size['n']}", "draws of each": f"{size['draws']:,}",
            "p": "∞" if row["threat"]["p"] == "inf" else f"{row['threat']['p']:g}", "δ": row["threat"]["written"],
            "published procedure": percent(row["published"]), "vote": percent(row["vote"]),
            "one draw": percent(row["one_draw"]),
        }
        for size in found["sizes"] for row in size["curves"]
    ]  # fmt: skip
    return rows, f"Certified accuracy in l2, percent, σ = {found['sigma']:g}."


def _trained(epochs: int, sigma: float) -> nn.Module:
    recipe = make_recipe({"objective": {"kind": "plain"}, "epochs": epochs, "lr": 0.05, "noise": sigma}, 0)
    return finetune(build("digits_cnn"), load_data("digits", "train"), recipe, progress=False).model


def main(arguments: list[str] | None = None) -> None:
    """The command; see --help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certify", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[200, 20])
    parser.add_argument(
        "--draws", type=int, nargs="+", default=[1100, 100_100], help=f"of each image, {SELECT} of them to select"
    )
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="that the network is trained, with noise")
    parser.add_argument("--deltas", nargs="+", default=["1/8", "1/4", "1/2"])
    parser.add_argument("--card", help="a network of this card, as it is, instead of one trained here")
    parser.add_argument("--weights", help="folder of its weight file (default: beside the card)")
    parser.add_argument("--data", default="digits", help="name or folder, as for wdat.load_data")
    parser.add_argument("--out", type=Path, default=HERE / "certify.json")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_model(chosen.card, root=chosen.weights) if chosen.card else _trained(chosen.epochs, chosen.sigma)
        sets = [load_data(chosen.data, "test").take(n, seed=0) for n in chosen.images]
        sizes = [
            compare(model, data, chosen.sigma, draws, chosen.batch, chosen.rounds, chosen.deltas)
            for data, draws in zip(sets, chosen.draws, strict=True)
        ]
    network = Path(chosen.card).stem if chosen.card else "digits"
    results = {"network": network, "batch": chosen.batch, "sigma": chosen.sigma, "sizes": sizes}
    config = {key: value for key, value in vars(chosen).items() if key not in ("out", "weights", "data")}
    path = records.write(chosen.out, "certify-benchmark", results, config)
    print(speeds(path).markdown(), proved(path).markdown(), sep="\n")
    if path.parent == HERE:
        numbers.fill(HERE / "README.md")


if __name__ == "__main__":
    main()
