"""`wdat certify`: what is proved of a network behind Gaussian noise; record, table and figure."""

import argparse
from typing import Any

from wdat.cli.arguments import kind, load, measuring, record, source, threats_of, told, verb


def add(sub: Any) -> None:
    """The verb and its arguments."""
    own = verb(
        sub, "certify", run, "what is proved of a network behind Gaussian noise, at any size",
        "Proves accuracy of the randomised network (one noise draw, or a vote of draws) in every Wasserstein ball, "
        "and says which proof is worth most. Draws are kept: run again it goes on.",
        "wdat certify net.yaml --sigma 0.25 --draws 1000 --data digits --delta 1/8 1/4",
        "wdat certify noisy.yaml --data photos --delta 1/4 --attacked 100    # also the bracket's upper end",
    )  # fmt: skip
    source(own)
    own.add_argument("--sigma", type=kind(float), help="standard deviation of the noise (default: the card's)")
    own.add_argument("--draws", type=kind(int), default=1000, help="of each image, in the mean (default: 1000)")
    own.add_argument("--spread", action="store_true", help="more draws where they move the curve, fewer elsewhere")
    own.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of the network's layers, which is certified as it then runs (default: float32)",
    )  # fmt: skip
    measuring(own, ("1/8", "1/4"), "2")
    own.add_argument("--confidence", type=kind(float), default=0.999, help="of all that is said (default: 0.999)")
    own.add_argument("--attacked", type=kind(int), default=0, metavar="N", help="also attack N images: a bracket")
    own.add_argument(
        "--autoattack", type=kind(int), default=0, metavar="N",
        help="also AutoAttack, its randomised setting, at linf 8/255 on N images",
    )  # fmt: skip
    own.add_argument(
        "--certified-minutes", type=kind(float), default=10.0, metavar="M",
        help="the most that relaxations take, where they prove more than noise (default: 10)",
    )  # fmt: skip
    own.add_argument("--seed", type=kind(int), default=0)


def run(args: argparse.Namespace) -> dict:
    """Certify, write and show."""
    threats = threats_of(args)
    return prove(
        args, threats, *load(args, "test"), args.sigma, draws=args.draws, spread=args.spread, attacked=args.attacked,
        confidence=args.confidence, seed=args.seed, minutes=args.certified_minutes, precision=args.precision,
    )  # fmt: skip


def prove(
    args: argparse.Namespace, threats: list, model: Any, data: Any, name: str, sigma: float | None = None, **settings
) -> dict:  # fmt: skip
    """What is proved of a loaded network: record, table, figure. settings: of `wdat.studies.proving.proved`."""
    from pathlib import Path

    from wdat.report import randomised
    from wdat.studies.proving import proved

    out = Path(args.out)
    found = proved(
        model, data, threats, sigma, curve=61, orders=sorted({1.0, threats[0].p, float("inf")}),
        batch_size=args.batch_size, state=out / f"{name}.draws", autoattack=args.autoattack, **settings,
    )  # fmt: skip
    path = record(args, "randomised", found, model, data, name, "-certified")
    print(randomised.certified(path).markdown())
    randomised.certified_curves(path, threats[0].r)
    print(randomised.choice_in_words(found))
    print(f"of two draws of an image one is right and one is wrong with probability {found['disagree']:.3f}")
    print(f"record, table and figure: {path.with_suffix('')}*; draws are kept in {out / name}.draws")
    return told(path)
