"""Complete verifiers beside the bracket: `python -m benchmarks.verifiers --cards ... --test-images DIR`.

Pointwise accuracy (p = inf, linf 2/255) on the first images of CIFAR-10's test set, the 200 on which verifiers are
compared: what the search for minimal distances leaves, what CROWN proves, and what branch and bound
(`wdat.accuracy.branch`) proves within a time limit for each image that is open. Beside it what Zhou et al.,
"Clip-and-Verify" (2025), list for complete verifiers on these images and networks, on a GPU, with the upper bound of
their attack. Those numbers are theirs, read from that table; none of them is measured here.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from wdat import records
from wdat.attacks.nearest import minimal_distances
from wdat.report import numbers
from wdat.report.table import tabled
from wdat.studies.cache import Cache
from wdat.studies.certificates import proof
from wdat.studies.jobs import Run, run_all
from wdat.threats.ball import Threat
from wdat.zoo.data import Data, load_data
from wdat.zoo.models import load_model

HERE = Path(__file__).parent
RADIUS = "2/255"
PUBLISHED = {  # proved, %, by verifier; left by their attack, %
    "cifar_cnn_a_adv": {"β-CROWN": 45.5, "GCP-CROWN": 48.5, "BICCOS": 48.5, "attack": 50.0},
    "cifar_cnn_a_adv4": {"β-CROWN": 46.5, "GCP-CROWN": 48.5, "BICCOS": 48.5, "attack": 49.5},
    "cifar_cnn_a_mix": {"β-CROWN": 42.0, "GCP-CROWN": 47.5, "BICCOS": 48.0, "attack": 53.0},
}


def first(folder: str | Path, n: int) -> Data:
    """The test images 0 to n - 1 of a folder test/CLASS/NNNNN.png, NNNNN their number in the test set."""
    data = load_data(folder, "test")
    places = sorted(path for path in (Path(folder) / "test").glob("*/*") if path.is_file())  # the order it is read in
    place = {int(path.stem): at for at, path in enumerate(places)}
    if missing := [k for k in range(n) if k not in place]:
        raise ValueError(f"{folder} has no test image {missing[0]:05d}; the first {n} of the test set are compared on")
    return data.at(torch.tensor([place[k] for k in range(n)]))


def compared(name: str, model: nn.Module, data: Data, seconds: float, state: Path | None = None) -> dict:
    """One network: images right, left by attack, proved by CROWN and within so many seconds an open image; a row."""
    radius, kept, started = Threat(RADIUS, torch.inf, torch.inf).delta, Cache(state, model), time.perf_counter()
    distance = minimal_distances(model, *data.batch(torch.arange(len(data))), torch.inf).distance
    left = (distance > radius).nonzero()[:, 0]
    searched = time.perf_counter() - started
    asked = {"r": torch.inf, "radius": radius}
    found = {
        limit: [kept.get(proof, data.at(left[k : k + 1]), **asked, seconds=limit) for k in range(len(left))]
        for limit in (0.0, seconds)
    }
    share = {limit: sum(one["proved"] for one in each) / len(data) for limit, each in found.items()}
    return {
        "network": name, "n": len(data), "clean": float((distance > 0).double().mean()), "left": len(left) / len(data),
        "crown": share[0.0], "proved": share[seconds], "search_seconds": searched,
        "seconds": [one["seconds"] for one in found[seconds]],
    }  # fmt: skip


def measured(card: Path, weights: str | None, images: str, n: int, seconds: float, state: Path) -> dict:
    """`compared` of a card, in a process of its own."""
    model = load_model(str(card), root=weights).requires_grad_(False)
    return compared(card.stem, model, first(images, n), seconds, state)


@tabled("verifiers-benchmark")
def brackets(found: dict) -> tuple[list[dict], str]:
    """A row a network: the two ends of the bracket, then what is published."""
    rows = []
    for row in found["rows"]:
        theirs = PUBLISHED.get(row["network"], {})
        cells = {"network": row["network"], "clean": row["clean"], "left by attack": row["left"],
                 "proved, CROWN": row["crown"], f"proved, {found['limit']:g} s": row["proved"]}  # fmt: skip
        cells = {key: value if isinstance(value, str) else f"{100 * value:.1f}" for key, value in cells.items()}
        cells["seconds an image"] = f"{sum(row['seconds']) / max(1, len(row['seconds'])):.1f}"
        for verifier in ("β-CROWN", "GCP-CROWN", "BICCOS"):
            cells[f"{verifier} †"] = f"{theirs[verifier]:.1f}" if theirs else "–"
        rows.append(cells | {"their attack †": f"{theirs['attack']:.1f}" if theirs else "–"})
    n = ", ".join(dict.fromkeys(str(row["n"]) for row in found["rows"]))
    return rows, (
        f"Pointwise accuracy, %, linf {RADIUS}, the first {n} test images: what our search leaves, what is proved by "
        "CROWN alone and by branch and bound within a time limit an image (one core); † published, on a GPU."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see --help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verifiers", description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=Path, nargs="+", required=True, help="model cards")
    parser.add_argument("--weights", help="folder of their weights")
    parser.add_argument("--test-images", required=True, help="folder with test/CLASS/NNNNN.png")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of each image that attack leaves open")
    parser.add_argument("--jobs", type=int, default=0, help="networks at the same time; 0: as many as fit")
    parser.add_argument("--state", type=Path, default=Path(".wdat/verifiers"), help="what a stopped run left")
    parser.add_argument("--out", type=Path, default=HERE / "verifiers.json")
    chosen = parser.parse_args(arguments)
    settings = {"weights": chosen.weights, "images": chosen.test_images, "n": chosen.images, "seconds": chosen.seconds,
                "state": chosen.state}  # fmt: skip
    runs = [Run(card.stem, measured, {"card": card, **settings}) for card in chosen.cards]
    rows = run_all(runs, chosen.jobs, desc="verifiers")
    config = {"images": chosen.images, "seconds": chosen.seconds, "cards": [card.stem for card in chosen.cards]}
    records.write(chosen.out, "verifiers-benchmark", {"rows": rows, "limit": chosen.seconds}, config, "cpu")
    print(brackets(chosen.out).markdown())
    if chosen.out.parent == HERE:
        numbers.fill(HERE / "README.md")


if __name__ == "__main__":
    main()
