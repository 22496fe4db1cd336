"""Complete verifiers beside the bracket: `python -m benchmarks.verifiers --cards ... --images DIR`.

Pointwise accuracy (p = inf, linf 2/255) on the 200 CIFAR-10 images on which verifiers of these networks are compared:
what the search for minimal distances leaves, what CROWN proves, and what branch and bound (`wdat.accuracy.branch`)
proves within a time limit for each image that attack leaves. Beside it what Zhou et al., "Clip-and-Verify" (2025),
list for complete verifiers on a GPU, and the upper bound of their attack. Those numbers are theirs, read from that
table; none of them is measured here.

DIR holds X_sdp.npy and y_sdp.npy of github.com/Verified-Intelligence/alpha-beta-CROWN, in
complete_verifier/datasets/sdp/cifar; their digests are checked.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from wdat import records
from wdat.accuracy.branch import width
from wdat.report import numbers
from wdat.report.table import tabled
from wdat.studies.cache import Cache, distances
from wdat.studies.certificates import proofs
from wdat.studies.jobs import Run, run_all
from wdat.threats.ball import Threat
from wdat.threats.checks import device_of
from wdat.zoo.data import Data, from_tensors
from wdat.zoo.models import load_model
from wdat.zoo.weights import sha256

HERE = Path(__file__).parent
RADIUS = "2/255"
FILES = {  # sha256
    "X_sdp.npy": "bc487064171fc74ce09b8c29db029da3a9be1f0275a23aa2f3aca6ccacb6958e",
    "y_sdp.npy": "b02c682406c3ae3aeba6b0fa0f6598ddb1d0331ce87c9b869136263946296dbd",
}
PUBLISHED = {  # proved, %, by verifier; left by their attack, %
    "cifar_cnn_a_adv": {"β-CROWN": 45.5, "GCP-CROWN": 48.5, "BICCOS": 48.5, "attack": 50.0},
    "cifar_cnn_a_adv4": {"β-CROWN": 46.5, "GCP-CROWN": 48.5, "BICCOS": 48.5, "attack": 49.5},
    "cifar_cnn_a_mix": {"β-CROWN": 42.0, "GCP-CROWN": 47.5, "BICCOS": 48.0, "attack": 53.0},
}


def sampled(folder: str | Path) -> Data:
    """The images of the comparison and their labels; ValueError unless the files are those."""
    found = []
    for name, digest in FILES.items():
        path = Path(folder) / name
        if (seen := sha256(path)) != digest:
            raise ValueError(f"{path} has the digest {seen}, the file of the comparison {digest}")
        found.append(torch.from_numpy(np.load(path)))
    x, y = found
    return from_tensors(x.permute(0, 3, 1, 2).contiguous(), y.long())


def compared(name: str, model: nn.Module, data: Data, seconds: float, state: Path | None = None) -> dict:
    """One network: images right, left by attack, proved by CROWN and within so many seconds an image left; a row."""
    radius, kept = Threat(RADIUS, torch.inf, torch.inf).delta, Cache(state, model)
    distance = distances(model, data, torch.inf, state=state, progress=False).distance
    left, at_once = (distance > radius).nonzero()[:, 0], width(device_of(model))
    proved, took = {}, {}
    for limit in (0.0, seconds):
        found = [
            kept.get(proofs, data.at(some), r=torch.inf, radii=[radius] * len(some), seconds=limit)
            for some in left.split(at_once)
            if len(some)
        ]
        proved[limit] = sum(int(part["proved"].sum()) for part in found) / len(data)
        took[limit] = [float(one) for part in found for one in part["seconds"]]
    return {
        "network": name, "n": len(data), "clean": float((distance > 0).double().mean()), "left": len(left) / len(data),
        "crown": proved[0.0], "proved": proved[seconds], "seconds": took[seconds],
    }  # fmt: skip


def measured(card: Path, weights: str | None, data: Data, seconds: float, state: Path) -> dict:
    """`compared` of a card, in a process of its own."""
    return compared(card.stem, load_model(str(card), root=weights).requires_grad_(False), data, seconds, state)


@tabled("verifiers-benchmark")
def brackets(found: dict) -> tuple[list[dict], str]:
    """A row a network: the two ends of the bracket, then what is published."""
    rows = []
    for row in found["rows"]:
        theirs = PUBLISHED.get(row["network"], {})
        cells = {"clean": row["clean"], "left": row["left"], "CROWN": row["crown"]}
        cells[f"branching, {found['limit']:g} s"] = row["proved"]
        cells = {"network": row["network"]} | {key: f"{100 * value:.1f}" for key, value in cells.items()}
        cells["mean s"] = f"{sum(row['seconds']) / max(1, len(row['seconds'])):.1f}"
        for verifier in ("β-CROWN", "GCP-CROWN", "BICCOS"):
            cells[f"{verifier} †"] = f"{theirs[verifier]:.1f}" if theirs else "–"
        rows.append(cells | {"left †": f"{theirs['attack']:.1f}" if theirs else "–"})
    n = ", ".join(dict.fromkeys(str(row["n"]) for row in found["rows"]))
    return rows, (
        f"Pointwise accuracy, %, linf {RADIUS}, {n} images: what our search leaves, what is proved by CROWN alone and "
        f"by branch and bound within {found['limit']:g} seconds an image (one core); † published, on a GPU."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see --help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verifiers", description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=Path, nargs="+", required=True, help="model cards")
    parser.add_argument("--weights", help="folder of their weights")
    parser.add_argument("--images", required=True, help="folder of X_sdp.npy and y_sdp.npy")
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of each image that attack leaves open")
    parser.add_argument("--jobs", type=int, default=0, help="networks at the same time; 0: as many as fit")
    parser.add_argument("--state", type=Path, default=Path(".wdat/verifiers"), help="what a stopped run left")
    parser.add_argument("--out", type=Path, default=HERE / "verifiers.json")
    chosen = parser.parse_args(arguments)
    settings = {"weights": chosen.weights, "data": sampled(chosen.images), "seconds": chosen.seconds,
                "state": chosen.state}  # fmt: skip
    runs = [Run(card.stem, measured, {"card": card, **settings}) for card in chosen.cards]
    rows = run_all(runs, chosen.jobs, desc="verifiers")
    config = {"seconds": chosen.seconds, "cards": [card.stem for card in chosen.cards]}
    records.write(chosen.out, "verifiers-benchmark", {"rows": rows, "limit": chosen.seconds}, config, "cpu")
    print(brackets(chosen.out).markdown())
    if chosen.out.parent == HERE:
        numbers.fill(HERE / "README.md")


if __name__ == "__main__":
    main()
