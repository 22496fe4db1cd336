"""What the verbs' arguments share: kinds of values, and those that name a network and data."""

import argparse
import textwrap
from collections.abc import Callable
from typing import Any


class Found(Exception):
    """A verb did its work and what it found is bad news: exit code 1. `found` is what --json prints of it."""

    def __init__(self, message: str, found: dict) -> None:
        super().__init__(message)
        self.found = found


def verb(sub: Any, name: str, run: Callable, short: str, long: str, *examples: str) -> argparse.ArgumentParser:
    """The parser of a verb that `run` carries out, with --json; its help ends with examples, one a line."""
    shown = "examples:\n" + "\n".join(f"  {line}" for line in examples)
    own = sub.add_parser(
        name, help=short, description=textwrap.fill(long, 100), epilog=shown,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    own.add_argument("--json", action="store_true", help="print one JSON object at the end, all else on stderr")
    own.set_defaults(run=run)
    return own


def kind(wanted: type) -> Callable[[str], Any]:
    """A type of argparse: the option's text, read as settings are."""

    def parse(text: str) -> Any:
        from wdat.settings import read

        try:
            return read(wanted, text, "the value")
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def pair(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as YAML reads it."""
    import yaml

    name, sign, value = text.partition("=")
    if not (sign and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value in {text!r} is not YAML") from None


def source(verb: argparse.ArgumentParser) -> None:
    """Arguments that name a network and data; read by `load`."""
    verb.add_argument(
        "model", help="a card (NAME.yaml), package.module:function of your own, a weight file, or a RobustBench name"
    )
    verb.add_argument("--architecture", metavar="NAME", help="of a weight file: package.module:function, resnet18, ...")
    verb.add_argument("--weights", help="folder of the weights (default: beside the card; models for RobustBench)")
    verb.add_argument("--data", default="cifar10", help="a folder of images, cifar10, digits, ...: see wdat.load_data")
    verb.add_argument("--root", help="folder of the data, if --data is a name")
    verb.add_argument("--size", type=kind(int), help="side in pixels that images of a folder are cropped to")
    verb.add_argument("--n", type=kind(int), help="use this many images only")
    verb.add_argument("--dataset", help="RobustBench's data set of the network (default: that of --data, or cifar10)")
    verb.add_argument("--threat", default="Linf", help="RobustBench's threat folder (default: Linf)")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    verb.add_argument("--batch-size", type=kind(int), default=128)


def measuring(verb: argparse.ArgumentParser, radii: tuple[str, ...], norm: str) -> None:
    """Arguments of the balls in which something is measured and of where its record goes."""
    verb.add_argument("--delta", nargs="+", default=radii, help=f"radii of the ball (default: {' '.join(radii)})")
    verb.add_argument("--p", default="2", help="Wasserstein order in (1, inf] (default: 2)")
    verb.add_argument("--norm", default=norm, help=f"pixel norm, 2 or inf (default: {norm})")
    verb.add_argument("--out", default="results", help="folder of the record and figures (default: results)")


def threats_of(args: argparse.Namespace) -> list[Any]:
    """The threats; ValueError for what is none, OSError where the record can not be written."""
    from wdat import records
    from wdat.threats.ball import Threat

    records.check_writable(args.out)
    return [Threat(delta, args.p, args.norm) for delta in args.delta]


def record(args: argparse.Namespace, kind: str, found: dict, model: Any, data: Any, name: str, suffix: str = "") -> Any:
    """The path of the record of one network, NAME + suffix, written."""
    from pathlib import Path

    from wdat import records

    return records.write(
        Path(args.out) / f"{name}{suffix}.json", kind, {"n": len(data), "networks": [{"network": name, **found}]},
        {key: value for key, value in vars(args).items() if key not in ("run", "json")},
        args.device, model={"name": name, **getattr(model, "card", {})},
        data={"name": data.name, "split": data.split, "source": data.source, "sha256": data.sha256},
    )  # fmt: skip


def told(path: Any) -> dict:
    """What --json says of the record of one network: where it is, and what it holds."""
    from wdat import records

    return {"record": path, **records.read(path)["results"]["networks"][0]}


def load(args: argparse.Namespace, split: str) -> tuple[Any, Any, str]:
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
