"""The command `wdat`. One function per verb; what a verb needs is imported inside it, so that --help is quick.

Exit codes: 0 done, 1 a run failed (a notebook's cell, LaTeX), 2 bad input, 130 interrupted. Errors are one or two
lines on stderr; WDAT_DEBUG=1 shows the traceback.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any


def _reproduce(sub: Any) -> None:
    verb = sub.add_parser("reproduce", help="run the notebooks: every figure and table of a profile")
    verb.add_argument("--profile", default="digits", help="a file in notebooks/profiles (default: digits)")
    verb.add_argument("--only", nargs="+", metavar="NN", help="these notebooks only, by number or name")
    verb.add_argument("--force", action="store_true", help="run them even if they are up to date")
    verb.add_argument("--from-records", action="store_true", help="show what is recorded, compute nothing: seconds")
    verb.add_argument("--jobs", type=_kind(int), help="runs at the same time (default: by cores and memory)")
    verb.add_argument("-P", dest="parameters", action="append", default=[], type=_pair, metavar="NAME=VALUE")

    def run(args: argparse.Namespace) -> None:
        from wdat import records
        from wdat.report import numbers
        from wdat.reproduce.runner import reproduce
        from wdat.reproduce.show import show

        if args.from_records:
            show(args.profile, args.only, parameters=dict(args.parameters))
        else:
            reproduce(args.profile, args.only, args.force, parameters=dict(args.parameters), jobs=args.jobs)
        numbers.publish(records.root(), args.profile)

    verb.set_defaults(run=run)


def _paper(sub: Any) -> None:
    verb = sub.add_parser("paper", help="build paper/wdat.pdf from the figures and tables")
    verb.add_argument("--arxiv", action="store_true", help="also write paper/build/arxiv.tar.gz, ready to submit")

    def run(args: argparse.Namespace) -> None:
        from wdat import records
        from wdat.reproduce import paper

        root = records.root()
        print(paper.build(root).relative_to(root))
        if args.arxiv:
            print(paper.arxiv(root).relative_to(root))

    verb.set_defaults(run=run)


def _source(verb: argparse.ArgumentParser) -> None:
    """Arguments that name a network and data; read by `_load`."""
    verb.add_argument(
        "model", help="a card (NAME.yaml), package.module:function of your own, a weight file, or a RobustBench name"
    )
    verb.add_argument("--architecture", metavar="NAME", help="of a weight file: package.module:function, resnet18, ...")
    verb.add_argument("--weights", help="folder of the weights (default: beside the card; models for RobustBench)")
    verb.add_argument("--data", default="cifar10", help="a folder of images, cifar10, digits, ...: see wdat.load_data")
    verb.add_argument("--root", help="folder of the data, if --data is a name")
    verb.add_argument("--size", type=_kind(int), help="side in pixels that images of a folder are cropped to")
    verb.add_argument("--n", type=_kind(int), help="use this many images only")
    verb.add_argument("--dataset", help="RobustBench's data set of the network (default: that of --data, or cifar10)")
    verb.add_argument("--threat", default="Linf", help="RobustBench's threat folder (default: Linf)")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    verb.add_argument("--batch-size", type=_kind(int), default=128)


def _load(args: argparse.Namespace, split: str) -> tuple[Any, Any, str]:
    """Model, data and the model's name."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    from pathlib import Path

    from wdat import records
    from wdat.zoo.data import load_data
    from wdat.zoo.models import load_model

    device = records.pick_device(args.device)
    print(records.device_line(args.device), flush=True)
    dataset = args.dataset or (args.data if args.data in ("cifar100", "imagenet") else "cifar10")
    where = {"root": args.weights, "architecture": args.architecture, "dataset": dataset, "threat": args.threat}
    model = load_model(args.model, **where, device=device)
    name = args.model.rpartition(":")[2] if ":" in args.model else Path(args.model).stem
    return model, load_data(args.data, split, args.root, args.n, args.size), name


def _evaluate(sub: Any) -> None:
    verb = sub.add_parser("evaluate", help="how robust a network is: W-PGD, optimal allocation; record and figure")
    _source(verb)
    verb.add_argument("--delta", nargs="+", default=["8/255"], help="radii of the ball, such as 2/255 8/255")
    verb.add_argument("--p", default="2", help="Wasserstein order in (1, inf] (default: 2)")
    verb.add_argument("--norm", default="inf", help="pixel norm, 2 or inf (default: inf)")
    verb.add_argument("--steps", type=_kind(int), default=50, help="of W-PGD (default: 50)")
    verb.add_argument("--tight", action="store_true", help="longer search for minimal distances, with AutoAttack's FAB")
    verb.add_argument(
        "--certified", type=_kind(int), default=0, metavar="N", help="certify N images too: a lower bound"
    )
    verb.add_argument(
        "--certified-minutes", type=_kind(float), default=0, metavar="M", help="certify for so long, images at random"
    )
    verb.add_argument("--autoattack", type=_kind(int), default=0, metavar="N", help="AutoAttack on N images, p = inf")
    verb.add_argument("--dual", action="store_true", help="also the dual attack on the cross-entropy")
    verb.add_argument("--save-set", metavar="FILE", help="write the adversary's images at the first --delta")
    verb.add_argument("--out", default="results", help="folder of the record and figures (default: results)")

    def run(args: argparse.Namespace) -> None:
        from pathlib import Path

        from wdat import records
        from wdat.report import figures, tables
        from wdat.studies.cache import prune
        from wdat.studies.evaluation import evaluate
        from wdat.threats.ball import Threat

        out = Path(args.out)
        records.check_writable(out)
        if args.save_set:
            records.check_writable(Path(args.save_set).parent)
        threats = [Threat(d, args.p, args.norm) for d in args.delta]
        p, r = threats[0].p, threats[0].r
        model, data, name = _load(args, "test")
        if "sigma" in getattr(model, "card", {}):
            raise ValueError(
                f"{args.model} is randomised, sigma={model.card['sigma']:g}; use: wdat certify {args.model}"
            )
        balls = [Threat(d, "inf", r) for d in args.delta] if args.autoattack and not threats[0].pointwise else []
        search, shared = {"tight": True} if args.tight else {}, {"batch_size": args.batch_size}
        shared["state"] = out / f"{name}.parts"
        results = evaluate(
            model, data, [*threats, *balls], steps=args.steps, search=search, dual=args.dual,
            orders=sorted({1.0, p, float("inf")}), curve=121, certified=args.certified,
            certified_minutes=args.certified_minutes, autoattacked=args.autoattack,
            sets=[(threats[0], args.save_set)] if args.save_set else (), **shared,
        )  # fmt: skip
        if args.save_set:
            (made,) = results.pop("sets")
            results["set"] = made
            ball = f"W_{p:g} {made['measured_cost']:.6g} of {threats[0].delta:.6g}"
            print(
                f"{args.save_set}: claims {100 * made['claimed']:.2f} % correct; its images, read back and measured: "
                f"{100 * made['measured']:.2f} %, {ball}, {'inside' if made['in_box'] else 'outside'} [0, 1]"
            )
        record = records.write(
            out / f"{name}.json", "evaluation", {"n": len(data), "networks": [{"network": name, **results}]},
            {key: value for key, value in vars(args).items() if key != "run"},
            args.device, model={"name": name, **getattr(model, "card", {})},
            data={"name": data.name, "split": data.split, "source": data.source, "sha256": data.sha256},
        )  # fmt: skip
        table = tables.evaluation(record)
        print(table.markdown())
        figures.sandwich(record, r, p)
        figures.curves(record, r)
        print(f"record and figures: {out}/{name}.json, .pdf, .png")
        size = prune(shared["state"]) / 2**20
        print(f"kept for other radii: {shared['state']}, {size:.1f} MiB (2 GiB at most); you may delete it")

    verb.set_defaults(run=run)


def _finetune(sub: Any) -> None:
    verb = sub.add_parser("finetune", help="fine-tune a network by a recipe; writes weights and a card")
    _source(verb)
    verb.add_argument(
        "recipe", help="YAML of wdat.training.loop.Recipe, such as {objective: {kind: w-trades, delta: 8/255}}"
    )
    verb.add_argument("out", help="card to write (NAME.yaml); its weights and checkpoint go beside it")
    verb.add_argument(
        "--validation", type=_kind(float), default=0.05, help="share of training images held out (default: 0.05)"
    )
    verb.add_argument("--seed", type=_kind(int), default=0)

    def run(args: argparse.Namespace) -> None:
        from pathlib import Path

        import yaml

        from wdat import records
        from wdat.training.loop import finetune, make_recipe
        from wdat.zoo.models import save_model
        from wdat.zoo.noise import Randomised

        out = Path(args.out)
        if out.suffix not in (".yaml", ".yml"):
            raise ValueError(f"{out} is the card to write; name it NAME.yaml")
        try:
            settings = yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{args.recipe} is not YAML: {' '.join(str(error).split())}") from None
        recipe = make_recipe(settings, args.seed)
        records.check_writable(out.parent)  # fails now rather than after hours
        model, data, name = _load(args, "train")
        card = getattr(model, "card", {})
        if isinstance(model, Randomised):  # what is trained is the network behind the noise; the card keeps its sigma
            model = model.network
        rest, held = data.split_off(args.validation, seed=0)
        done = finetune(model, rest, recipe, validation=held, checkpoint=out.with_suffix(".checkpoint"))
        card = {key: value for key, value in card.items() if key not in ("sha256", "bytes", "weights")}
        training = f"{recipe.objective.name}, {recipe.epochs} epochs, from {name}"
        save_model(done.model, out, **{**card, "name": out.stem, "training": training})
        records.write(
            out.with_suffix(".json"), "history", {"history": done.history}, settings, args.device, seeds=[args.seed]
        )
        print(
            f"{out}: {100 * done.history[-1]['validation_accuracy']:.1f} % clean on validation" if done.history else out
        )

    verb.set_defaults(run=run)


def _certify(sub: Any) -> None:
    verb = sub.add_parser("certify", help="what is proved of a network behind Gaussian noise, at any size")
    _source(verb)
    verb.add_argument("--sigma", type=_kind(float), help="standard deviation of the noise (default: the card's)")
    verb.add_argument("--draws", type=_kind(int), default=1000, help="of each image, in the mean (default: 1000)")
    verb.add_argument("--delta", nargs="+", default=["1/8", "1/4"], help="radii of the ball (default: 1/8 1/4)")
    verb.add_argument("--p", default="2", help="Wasserstein order in (1, inf] (default: 2)")
    verb.add_argument("--norm", default="2", help="pixel norm, 2 or inf (default: 2)")
    verb.add_argument("--confidence", type=_kind(float), default=0.999, help="of all that is said (default: 0.999)")
    verb.add_argument("--attacked", type=_kind(int), default=0, metavar="N", help="also attack N images: a bracket")
    verb.add_argument("--seed", type=_kind(int), default=0)
    verb.add_argument("--out", default="results", help="folder of the record and figures (default: results)")

    def run(args: argparse.Namespace) -> None:
        from pathlib import Path

        from wdat import records
        from wdat.randomised.certify import certify
        from wdat.report import randomised
        from wdat.threats.ball import Threat

        out = Path(args.out)
        records.check_writable(out)
        threats = [Threat(d, args.p, args.norm) for d in args.delta]
        model, data, name = _load(args, "test")
        found = certify(
            model, data, threats, args.sigma, draws=args.draws, confidence=args.confidence, curve=61,
            orders=sorted({1.0, threats[0].p, float("inf")}), attacked=args.attacked, batch_size=args.batch_size,
            seed=args.seed, state=out / f"{name}.draws",
        )  # fmt: skip
        record = records.write(
            out / f"{name}-certified.json", "randomised", {"n": len(data), "networks": [{"network": name, **found}]},
            {key: value for key, value in vars(args).items() if key != "run"},
            args.device, model={"name": name, **getattr(model, "card", {})},
            data={"name": data.name, "sha256": data.sha256},
        )  # fmt: skip
        print(randomised.certified(record).markdown())
        randomised.certified_curves(record, threats[0].r)
        print(f"of two draws of an image one is right and one is wrong with probability {found['disagree']:.3f}")
        print(f"record, table and figure: {record.with_suffix('')}*; draws are kept in {out / name}.draws")

    verb.set_defaults(run=run)


VERBS = [_reproduce, _paper, _evaluate, _finetune, _certify]


def _kind(kind: type) -> Callable[[str], Any]:
    """A type of argparse: the option's text, read as settings are."""

    def parse(text: str) -> Any:
        from wdat.settings import read

        try:
            return read(kind, text, "the value")
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _pair(text: str) -> tuple[str, Any]:
    import yaml

    name, sign, value = text.partition("=")
    if not (sign and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value in {text!r} is not YAML") from None


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from importlib.metadata import version

    top = argparse.ArgumentParser(prog="wdat", description="Wasserstein distributional adversarial training.")
    top.add_argument("--version", action="version", version=f"wdat {version('wdat')}")
    sub = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in VERBS:
        add(sub)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again to resume", 130)
    except Exception as error:
        failed = type(error).__name__ in ("CellFailed", "PaperFailed")
        if os.environ.get("WDAT_DEBUG") or not (failed or isinstance(error, (ValueError, OSError))):
            raise
        return _say(str(error), 1 if failed else 2)
    return 0


def _say(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"wdat: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
