"""`wdat finetune`: a network fine-tuned by a recipe; weights, card and history. By several processes under torchrun."""

import argparse
from typing import Any

from wdat.cli.arguments import kind, load, source, verb


def add(sub: Any) -> None:
    """The verb and its arguments."""
    own = verb(
        sub, "finetune", run, "fine-tune a network by a recipe; writes weights and a card",
        "Fine-tunes a network by a recipe, a YAML file of an objective and settings, such as: "
        "{objective: {kind: w-trades, delta: 8/255}, epochs: 5, lr: 0.01}. Run again after an interruption it goes on.",
        "wdat finetune net.yaml recipe.yaml tuned.yaml --data photos    # photos/train/CLASS/*.png",
        "torchrun --nproc-per-node 4 -m -- wdat.cli finetune net.yaml recipe.yaml tuned.yaml --data photos",
        "wdat evaluate tuned.yaml --data photos    # then compare",
    )  # fmt: skip
    source(own)
    own.add_argument(
        "recipe", help="YAML of wdat.training.loop.Recipe, such as {objective: {kind: w-trades, delta: 8/255}}"
    )
    own.add_argument("out", help="card to write (NAME.yaml); its weights and checkpoint go beside it")
    own.add_argument(
        "--validation", type=kind(float), default=0.05, help="share of training images held out (default: 0.05)"
    )
    own.add_argument("--seed", type=kind(int), default=0)


def run(args: argparse.Namespace) -> dict | None:
    """Fine-tune, save and say the accuracy on validation images."""
    from pathlib import Path

    import yaml

    from wdat import records
    from wdat.training.distributed import first
    from wdat.training.loop import finetune, make_recipe
    from wdat.zoo.models import save_model
    from wdat.zoo.sparse import masked

    out = Path(args.out)
    if out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{out} is the card to write; name it NAME.yaml")
    try:
        settings = yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{args.recipe} is not YAML: {' '.join(str(error).split())}") from None
    recipe = make_recipe(settings, args.seed)
    records.check_writable(out.parent)  # fails now rather than after hours
    model, data, name = load(args, "train")
    card = getattr(model, "card", {})
    if card.get("density") is not None:  # a sparse network stays so
        model = masked(model)
    rest, held = data.split_off(args.validation, seed=0)
    done = finetune(model, rest, recipe, validation=held, checkpoint=out.with_suffix(".checkpoint"))
    if not first():  # started together by torchrun, one of them writes
        return None
    card = {key: value for key, value in card.items() if key not in ("sha256", "bytes", "weights")}
    training = f"{recipe.objective.name}, {recipe.epochs} epochs, from {name}"
    save_model(done.model, out, **{**card, "name": out.stem, "training": training})
    records.write(
        out.with_suffix(".json"), "history", {"history": done.history}, settings, args.device, seeds=[args.seed]
    )
    print(f"{out}: {100 * done.history[-1]['validation_accuracy']:.1f} % clean on validation" if done.history else out)
    return {"card": out, "record": out.with_suffix(".json"), "last": done.history[-1] if done.history else None}
