"""`wdat evaluate`: how robust a network is; record, table and figures. By several processes under torchrun."""

import argparse
from typing import Any

from wdat.cli.arguments import kind, load, measuring, record, source, threats_of, told, verb
from wdat.cli.certify import prove


def add(sub: Any) -> None:
    """The verb and its arguments."""
    own = verb(
        sub, "evaluate", run, "how robust a network is: W-PGD, optimal allocation; record and figure",
        "Brackets the accuracy that a distributional adversary of radius delta leaves: from above by attacks and the "
        "optimal allocation over minimal distances, from below, if asked, by certificates. Run again after an "
        "interruption it goes on; other radii of the same network cost next to nothing.",
        "wdat evaluate net.yaml --data photos --delta 2/255 8/255    # photos/test/CLASS/*.png",
        "wdat evaluate mine.nets:make --data cifar10 --root data/cifar10 --n 1000    # a function of yours",
        "wdat evaluate weights.pt --architecture mine.nets:make --data photos --size 32",
        "wdat evaluate Rade2021Helper_R18_ddpm --data cifar10 --root data/cifar10    # RobustBench, models/...",
        "wdat evaluate net.yaml --data digits --norm 2 --delta 1/4 --certified 64 --json > found.json",
    )  # fmt: skip
    source(own)
    measuring(own, ("8/255",), "inf")
    own.add_argument("--steps", type=kind(int), default=50, help="of W-PGD (default: 50)")
    own.add_argument("--tight", action="store_true", help="longer search for minimal distances, with AutoAttack's FAB")
    own.add_argument("--certified", type=kind(int), default=0, metavar="N", help="certify N images too: a lower bound")
    own.add_argument(
        "--certified-minutes", type=kind(float), default=0, metavar="M", help="certify for so long, images at random"
    )
    own.add_argument(
        "--branching-minutes", type=kind(float), default=0, metavar="M", help="then raise the lower bound for so long"
    )
    own.add_argument("--autoattack", type=kind(int), default=0, metavar="N", help="AutoAttack on N images, p = inf")
    own.add_argument("--dual", action="store_true", help="also the dual attack on the cross-entropy")
    own.add_argument("--per-class", action="store_true", help="who pays: every class under --p and p = inf; figures")
    own.add_argument("--save-set", metavar="FILE", help="write the adversary's images at the first --delta")


def run(args: argparse.Namespace) -> dict | None:
    """Evaluate, write and show."""
    from pathlib import Path

    from wdat import records
    from wdat.report import figures, tables
    from wdat.studies.cache import prune
    from wdat.studies.evaluation import evaluate
    from wdat.threats.ball import Threat
    from wdat.training.distributed import first
    from wdat.zoo.noise import Randomised

    out, threats = Path(args.out), threats_of(args)
    if args.save_set:
        records.check_writable(Path(args.save_set).parent)
    p, r = threats[0].p, threats[0].r
    if args.per_class and threats[0].pointwise:
        raise ValueError("--per-class compares W_p with p=inf at the same radii; leave --p inf out, or name p < inf")
    model, data, name = load(args, "test")
    if isinstance(model, Randomised):
        print(f"{name} is behind noise, sigma={model.sigma:g}: bracketed as by wdat certify, all images attacked")
        return prove(args, threats, model, data, name, attacked=len(data))
    balls = [Threat(d, "inf", r) for d in args.delta] if args.autoattack and not threats[0].pointwise else []
    search, shared = {"tight": True} if args.tight else {}, {"batch_size": args.batch_size}
    shared["state"] = out / f"{name}.parts"
    results = evaluate(
        model, data, [*threats, *balls], steps=args.steps, search=search, dual=args.dual,
        orders=sorted({1.0, p, float("inf")}), curve=121, certified=args.certified, autoattacked=args.autoattack,
        certified_minutes=args.certified_minutes, branching_minutes=args.branching_minutes,
        sets=[(threats[0], args.save_set)] if args.save_set else (), **shared,
    )  # fmt: skip
    if not first():  # started together by torchrun, one of them writes
        return None
    if args.save_set:
        (made,) = results.pop("sets")
        results["set"] = made
        ball = f"W_{p:g} {made['measured_cost']:.6g} of {threats[0].delta:.6g}"
        print(
            f"{args.save_set}: claims {100 * made['claimed']:.2f} % correct; its images, read back and measured: "
            f"{100 * made['measured']:.2f} %, {ball}, {'inside' if made['in_box'] else 'outside'} [0, 1]"
        )
    path = record(args, "evaluation", results, model, data, name)
    print(tables.evaluation(path).markdown())
    figures.bracket(path, r, p)
    figures.curves(path, r)
    print(f"record and figures: {out}/{name}.json, {name}-*.png, .pdf")
    if args.per_class:
        _per_class(out, name, model, data, threats, {"search": search, "batch_size": args.batch_size})
    size = prune(shared["state"]) / 2**20
    print(f"kept for other radii: {shared['state']}, {size:.1f} MiB (2 GiB at most); you may delete it")
    return told(path)


def _per_class(out: Any, name: str, model: Any, data: Any, threats: list, settings: dict) -> None:
    """Record, tables and figures of every class beside those of the whole."""
    from wdat import records
    from wdat.report import classwise as report
    from wdat.studies.classwise import classwise

    found = classwise({name: model}, data, threats, out, progress=False, **settings)
    record = records.write(out / f"{name}-classes.json", "classwise", found)
    print(report.disparity(record).markdown())
    for draw in (report.bars, report.budget, report.confusion):
        draw(record)
    print(f"every class: {out}/{name}-classes.json; figures {name}-classes-bars, -budget, -confusion")
