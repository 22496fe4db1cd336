"""Methods compared at equal clean accuracy, on the same test images, from the minimal distances of every run.

A method swept along its own knob (radius, weight) gives a path of points (clean accuracy, A_delta); so does every run,
from its end back to the network it started from (`training.loop.interpolate`). What a method offers at clean accuracy
c is the highest A_delta of its points, and of the straight lines between neighbours on a path, with at least that
clean accuracy: its frontier f(c), non-increasing in c. Methods are compared by f - f' at the same c, with a paired
bootstrap: a replicate draws test images once for all runs, then recomputes every point, frontier and difference.

`validated` leaves no choice to the test images: each side's setting is chosen on validation images, once.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from wdat.threats.ball import Threat, parse_number

BEST_PROPOSED = "best proposed"
Path = Sequence[
    Sequence[Tensor]
]  # settings next to each other; of each, minimal distances (N,) of every seed's network
FAR = 1e9  # in place of inf ("nothing flips it"), so that an image drawn 0 times costs 0


def bootstrap_counts(n: int, draws: int, seed: int = 0) -> Tensor:
    """How often each of n images occurs in each resampled set: float64 (1 + draws, n); the first row is all ones."""
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    return torch.cat([torch.ones(1, n, dtype=torch.float64), counts])


def resampled_accuracy(distances: Tensor, counts: Tensor, delta: float | str, p: float) -> Tensor:
    """A_delta of each resampled set: distances (N,), counts (B, N) -> float64 (B,); p in [1, inf).

    `accuracy_curve` with weights: the nearest images are flipped until the budget is spent, the last
    of them in part. delta = 0 gives the clean accuracy.
    """
    d, order = distances.double().clamp_max(FAR).sort()
    counts = counts[:, order]
    n, delta = counts.sum(1), parse_number(delta)
    if not delta:
        return counts[:, d > 0].sum(1) / n
    price = (d / delta).pow(p)
    spent, flipped = (counts * price).cumsum(1), counts.cumsum(1)
    last = (spent <= n[:, None]).sum(1, keepdim=True)  # the image that is paid for in part, N if all are flipped
    before = (last - 1).clamp_min(0)
    paid, whole = (torch.where(last > 0, t.gather(1, before), 0.0)[:, 0] for t in (spent, flipped))
    part = torch.where(last[:, 0] < len(d), (n - paid) / price[last[:, 0].clamp_max(len(d) - 1)].clamp_min(1e-300), 0.0)
    return 1 - (whole + part) / n


def frontier(clean: Tensor, robust: Tensor, at: Tensor) -> Tensor:
    """Highest robust accuracy with clean accuracy of at least `at`: (K, B), (K, B), (B,) -> (B,).

    Neighbours are settings next to each other in the order given. -inf where no setting reaches `at`.
    """
    best = torch.where(clean >= at, robust, -torch.inf).amax(0)
    for c0, c1, r0, r1 in zip(clean, clean[1:], robust, robust[1:], strict=False):
        crossing = (c0 - at) * (c1 - at) < 0
        share = (at - c0) / torch.where(crossing, c1 - c0, 1.0)
        best = torch.where(crossing, torch.maximum(best, r0 + share * (r1 - r0)), best)
    return best


def equal_clean(
    runs: dict[str, Sequence[Path]], before: Tensor, proposed: Sequence[str], baselines: Sequence[str],
    threats: Sequence[Threat], offsets: Sequence[float] = (-0.03, -0.02, -0.01, 0.0), draws: int = 1000, seed: int = 0,
    level: float = 0.95,
) -> list[dict]:  # fmt: skip
    """Each proposed method against each baseline, and best against best, at clean accuracy before plus `offsets`.

    Args:
        runs: the paths of every method, all on the same N test images. Seeds are averaged (the intervals are over test
            images). A setting may be on several paths.
        before: minimal distances (N,) before fine-tuning; every replicate has its own clean accuracy before.
        proposed, baselines: names in `runs`; those that are not there (none of their runs ended well) are left out.
        threats: W_p balls with p < inf, at which the robust accuracy is taken.

    Returns a row for each threat, offset and proposed method, and for `BEST_PROPOSED` if there are several: "delta" as
    written, "proposed", "offset", "clean", "accuracy" by method, "differences" by baseline and "best baseline", each
    {"value", "low", "high"} (None where a method does not reach that clean accuracy). Both bests are taken anew in
    every replicate, so that the intervals include the picking; the values themselves are maxima on these images, on
    both sides. ValueError if nothing of either side is in `runs`.
    """
    proposed, baselines = ([name for name in names if name in runs] for names in (proposed, baselines))
    if not proposed or not baselines:
        raise ValueError(
            f"methods of proposed and baselines are to be compared; the runs are of {', '.join(runs) or 'none'}"
        )
    counts = bootstrap_counts(len(before), draws, seed)
    start = resampled_accuracy(before, counts, 0, 1)

    def points(delta: float, p: float) -> dict[str, list[Tensor]]:
        known: dict[int, Tensor] = {}

        def accuracy(d: Tensor) -> Tensor:
            if id(d) not in known:
                known[id(d)] = resampled_accuracy(d, counts, delta, p)
            return known[id(d)]

        return {
            name: [
                torch.stack([torch.stack([accuracy(d) for d in seeds]).mean(0) for seeds in path])
                for path in runs[name]
            ]
            for name in (*proposed, *baselines)
        }

    clean = points(0, 1)  # of any order: radius 0
    robust = [(threat.written, points(threat.delta, threat.p)) for threat in threats]
    rows = []
    for (written, curves), offset in itertools.product(robust, offsets):
        found = {
            name: torch.stack([
                frontier(c, v, start + offset) for c, v in zip(clean[name], values, strict=True)
            ]).amax(0) for name, values in curves.items()
        }  # fmt: skip
        against = {name: found[name] for name in baselines}
        against["best baseline"] = torch.stack(list(against.values())).amax(0)
        own = {name: found[name] for name in proposed}
        if len(proposed) > 1:
            own[BEST_PROPOSED] = torch.stack(list(own.values())).amax(0)
        rows += [
            {
                "delta": written, "proposed": name, "offset": offset, "clean": float(start[0] + offset),
                "accuracy": {n: _finite(v[0]) for n, v in {name: values, **against}.items()},
                "differences": {n: _interval(values - v, level) for n, v in against.items()},
            }
            for name, values in own.items()
        ]  # fmt: skip
    return rows


def validated(
    options: Sequence[dict], before: float, proposed: Sequence[str], baselines: Sequence[str],
    threats: Sequence[Threat], loss: float = 0.01, draws: int = 1000, seed: int = 0, level: float = 0.95,
) -> list[dict]:  # fmt: skip
    """Each method against each baseline, and best against best, at settings chosen on validation images.

    Chosen at each threat is what is most accurate under it among settings, of the method or of all of its side, that
    lose at most `loss` of the clean accuracy `before`; where none does, what loses least. All on validation images.

    Args:
        options: {"method", "variant", "clean", "optimal" by radius as written, "distance"} of every setting: accuracies
            on validation images in the mean over seeds, minimal distances (N,) of every seed on the same test images.

    Returns a row for each threat and method, and for `BEST_PROPOSED`: "delta", "method", its "accuracy", "clean"
    accuracy and "setting", those of the baselines at "others", and "differences" as of `equal_clean`.
    """
    counts, rows = bootstrap_counts(len(options[0]["distance"][0]), draws, seed), []
    of = {o["method"]: [other for other in options if other["method"] == o["method"]] for o in options}
    sides = {BEST_PROPOSED: proposed, "best baseline": baselines}
    of |= {name: [o for o in options if o["method"] in methods] for name, methods in sides.items()}

    def measured(option: dict, delta: float | str, p: float) -> Tensor:
        return torch.stack([resampled_accuracy(d, counts, delta, p) for d in option["distance"]]).mean(0)

    for threat in threats:

        def fitness(option: dict, written: str = threat.written) -> tuple[float, float]:
            return min(0.0, option["clean"] - before + loss), option["optimal"][written]

        chosen = {name: max(own, key=fitness) for name, own in of.items() if own}
        accuracy = {name: measured(option, threat.delta, threat.p) for name, option in chosen.items()}
        told = {
            name: {"accuracy": float(accuracy[name][0]), "clean": float(measured(option, 0, 1)[0]),
                   "setting": option["variant"]} for name, option in chosen.items()
        }  # fmt: skip
        others = [name for name in (*baselines, "best baseline") if name in chosen]
        rows += [
            {
                "delta": threat.written, "method": name, **told[name], "others": {n: told[n] for n in others},
                "differences": {n: _interval(accuracy[name] - accuracy[n], level) for n in others if n != name},
            }
            for name in (*proposed, *baselines, BEST_PROPOSED) if name in chosen
        ]  # fmt: skip
    return rows


def _finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _interval(values: Tensor, level: float) -> dict[str, float | None]:
    """The value on all images (first) and the percentile interval of the replicates where both methods exist."""
    drawn = values[1:][values[1:].isfinite()]
    if not values[0].isfinite() or len(drawn) < len(values) // 2:
        return {"value": None, "low": None, "high": None}
    low, high = torch.quantile(drawn, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}
