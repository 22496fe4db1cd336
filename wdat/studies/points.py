"""The nearest misclassified points known of a data set: those of the search, and what any attack finds nearer.

Every attack of an evaluation sees the images that the curve of optimal allocation is about; whatever it flips, within
whatever distance, belongs to that curve. Then the curve is never above the attack: let it flip the images F, moved by
n_i, with W_p distance (mean n_i^p)^(1/p) <= delta. The joined distances are d_i <= n_i on F, so to flip F costs at most
delta^p, and the optimal allocation, which spends delta^p on the nearest images, flips at least as many. For p = inf
d_i <= n_i <= delta on F says it image by image. Both need the attack inside its ball exactly (`ball.inner_radius`), and
one rule for who is flipped: the true class does not win strictly, by the very forward pass that judged the attack.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wdat.attacks.nearest import Nearest

LOST = 0.05  # of the images, from which on it is said that attacks beat the search, or fewer steps more of them
CHANCE = 1e-3  # how improbable guesses as bad as the network's must be before it is said
STEPPED = 64  # images, in each pixel norm, of which it is seen whether more steps weaken the attack


def nearer_points(x: Tensor, norms: Tensor, correct: Tensor, known: Tensor | None) -> dict:
    """An attack's "norms" and "correct" (N,), and "nearer": rows and points where it flips nearer than `known` (N,).

    Without `known` there is nothing to be nearer than, and no points are kept.
    """
    norms, correct = norms.cpu(), correct.cpu()
    found = ~correct & (norms < (torch.zeros_like(norms) if known is None else known))
    rows = found.nonzero()[:, 0]
    return {"norms": norms, "correct": correct, "nearer": {"rows": rows, "x": x[rows.to(x.device)].cpu()}}


@dataclass
class NearestPoints:
    """Distances (N,), the points (N, C, H, W) or None where only distances are wanted, and what the search had found.

    `searched`: its distances, which do not change, so that what an attack adds does not depend on the others.
    """

    distance: Tensor
    x: Tensor | None
    searched: Tensor
    silent: int
    passes: float
    gain: float

    @classmethod
    def of(cls, found: Nearest) -> "NearestPoints":
        """Of a search, before any attack."""
        x = found.x.clone() if len(found.x) else None
        return cls(found.distance.clone(), x, found.distance, int(found.silent.sum()), found.passes, found.gain)

    def describe(self) -> dict:
        """Of the search, its passes and gain, silent gradients, and how many images an attack was nearer for."""
        joined = int((self.distance < self.searched).sum())
        return {"passes": self.passes, "gain": self.gain, "silent": self.silent, "joined": joined}

    def join(self, found: dict, index: Tensor | None = None) -> None:
        """Take in what `nearer_points` says of all images, or of those at `index` (n,)."""
        index = torch.arange(len(self.distance)) if index is None else index
        rows, points = found["nearer"]["rows"], found["nearer"]["x"]
        norms, images = found["norms"][rows], index[rows]
        nearer = norms < self.distance[images]
        self.distance[images[nearer]] = norms[nearer]
        if self.x is not None:
            self.x[images[nearer]] = points[nearer]


def findings(result: dict, correct: int, classes: int) -> list[str]:
    """What an evaluation shows of labels that do not fit and of gradients that say nothing: what was seen and means.

    After the advice of AutoAttack's authors: no zero gradients, accuracy that reaches 0 at large radii, more steps that
    do not weaken an attack, and no search without gradients that wins.
    """
    from scipy.stats import binomtest

    said, zero, n = [], result["clean"]["zero_gradients"], result["n"]
    if (chance := binomtest(correct, n, 1 / classes, "less").pvalue) < CHANCE:
        said.append(
            f"{correct} of {n} images are classified correctly, {100 * correct / n:.1f} %, below chance: guesses among "
            f"{classes} classes are right for {100 / classes:.3g} %, as few as here with probability {chance:.1g}; "
            "compare the order of data.classes with that of the network's outputs, and the normalisation inside the "
            "model with that of its training"
        )
    if zero:
        said.append(
            f"{zero} of {correct} correctly classified images have zero gradients: attacks by gradients say nothing of "
            "them, their accuracies are too high"
        )
    for row in result.get("single_step", []):
        threat, right = row["threat"], round(row["clean"] * row["n"])
        if row["weakened"] > LOST * right:
            said.append(
                f"{row['weakened']} of {right} correctly classified images are flipped by one step of PGD "
                f"(l{float(threat['r']):g}, {threat['written']}, {row['loss']}) and left right by {row['steps']} "
                "steps: gradients lead astray on the way, attacks by gradients are weak here, their accuracies too high"
            )
    for row in result.get("optimal", []):
        norm = f"l{float(row['r']):g}"
        if row["silent"]:
            said.append(
                f"{row['silent']} of {correct} correctly classified images have gradients that say nothing ({norm}): "
                "their distances come from a search without gradients (Square Attack) and may be far too large"
            )
        if row["never_flipped"]:
            said.append(
                f"{round(row['never_flipped'] * row['n'])} of {row['n']} images were flipped by nothing, at whatever "
                f"{norm} distance; accuracy must reach 0 at large radii, so the curve may be far too high"
            )
        if row["joined"] > LOST * correct:
            said.append(
                f"attacks came nearer than the search for minimal distances on {row['joined']} of {correct} images "
                f"({norm}); the curve counts what they found, a longer search (restarts, tight) may find more"
            )
    return said
