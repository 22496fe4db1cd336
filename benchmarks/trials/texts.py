"""Texts and files with pieces changed: threats, recipes, cards, weights, records, profiles, checkpoints, states."""

import contextlib
import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

import wdat
from benchmarks.trials.spoiled import Kind, mangled, one, tiny, word
from wdat import cli, records
from wdat.reproduce import profiles
from wdat.training.recipes import make_recipe
from wdat.zoo.models import load_model, save_model
from wdat.zoo.networks import build

ROOT = Path(__file__).parents[2]
QUICK = {"steps": 1, "search": {"steps": 1, "rivals": 1}, "losses": ("ce",), "progress": False}


def damaged(rng: random.Random, good: bytes) -> bytes:
    """The bytes cut short, or with a few of them changed."""
    if rng.random() < 0.3:
        return good[: rng.randrange(len(good))]
    found = bytearray(good)
    for _ in range(rng.choice([1, 1, 3, 20])):
        found[rng.randrange(len(found))] ^= rng.randint(1, 255)
    return bytes(found)


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {error}") from error


def _commanded(words: list[str]) -> None:
    """The command, which must refuse with exit code 2 and a sentence."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(words)
    if code == 2:
        raise ValueError(said.getvalue())


def calls(folder: Path) -> dict[str, tuple[Callable, dict[str, Any], dict[str, Kind]]]:
    """By what is read: a reader of one text or file, the good content, and how it is changed."""
    card, model = folder / "net.yaml", build("digits_cnn", width=2)
    save_model(model, card, architecture="digits_cnn", arguments={"width": 2})
    other = folder / "other.yaml"
    weights, own = card.with_suffix(".safetensors").read_bytes(), folder / "weights"
    buffer = io.BytesIO()
    plain = build("digits_cnn")
    torch.save(plain.state_dict(), buffer)
    record = records.write(folder / "good.json", "k", {"a": [0.5, 1.0], "b": {"c": 1}}, {"n": 3})
    sources = profiles.notebooks(ROOT)
    (folder / "notebooks" / "profiles").mkdir(parents=True)
    smoke = (ROOT / "notebooks" / "profiles" / "smoke.yaml").read_text()
    network, here = tiny(), wdat.from_tensors(torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(1)),
                                              torch.tensor([0, 1, 2, 3, 4, 0]))  # fmt: skip
    recipe = make_recipe({"objective": {"kind": "plain"}, "epochs": 1}, 0)
    run, state = folder / "run.pt", folder / "state"
    history = wdat.finetune(network, here, recipe, checkpoint=run, progress=False).history
    found = wdat.evaluate(network, here, "1/16", state=state, **QUICK)
    kept = {path.name: path.read_bytes() for path in state.iterdir()}
    name = max(kept, key=lambda key: len(kept[key]))

    def put(path: Path, content: str | bytes) -> Path:
        path.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
        return path

    def resumed(content: bytes) -> list[dict]:
        again = wdat.finetune(network, here, recipe, checkpoint=put(run, content), progress=False).history
        assert again == history, "a damaged checkpoint gave another history"
        return again

    def evaluated(content: bytes) -> dict:
        shutil.rmtree(state)
        state.mkdir()
        for file, whole in kept.items():
            put(state / file, content if file == name else whole)
        again = wdat.evaluate(network, here, "1/16", state=state, **QUICK)
        assert again == found, "a damaged state gave other numbers"
        return again

    words = {"--n": one(word, "0", "-1", "1.5", "nan"), "--steps": one(word, "0", "-2", "1.5"), "--p": one(word,
        "0.5", "nan"),
             "--delta": one(word, "8", "nan", "1/0"), "--norm": one(word, "1", "l3"), "--batch-size": one(word, "0"),
             "--device": one(word, "gpu"), "--data": word}  # fmt: skip
    option = lambda rng, _: (o := rng.choice(list(words)), words[o](rng, None))  # noqa: E731
    return {
        "threat text": (wdat.Threat.read, {"text": "W_1.5 linf 8/255"}, {"text": mangled}),
        "recipe file": (lambda text: make_recipe(_yaml(text), 0), {"text": RECIPE}, {"text": mangled}),
        "card": (lambda text: load_model(put(other, text)), {"text": card.read_text()}, {"text": mangled}),
        "weights of a card": (
            lambda content: put(card.with_suffix(".safetensors"), content) and load_model(card), {"content": weights},
            {"content": lambda rng, good: damaged(rng, good)},
        ),
        "safetensors": (lambda content: load_model(put(own.with_suffix(".safetensors"), content),
            architecture="digits_cnn"),
                        {"content": save(plain.state_dict())}, {"content": damaged}),
        "torch file": (lambda content: load_model(put(own.with_suffix(".pt"), content), architecture="digits_cnn"),
                       {"content": buffer.getvalue()}, {"content": damaged}),
        "record": (lambda text: records.read(put(folder / "bad.json", text)), {"text": record.read_text()},
                   {"text": mangled}),
        "profile": (lambda text: put(folder / "notebooks/profiles/a.yaml", text)
                    and profiles.read_profile(folder, "a", sources), {"text": smoke}, {"text": mangled}),
        "checkpoint": (resumed, {"content": run.read_bytes()}, {"content": damaged}),
        "state of an evaluation": (evaluated, {"content": kept[name]}, {"content": damaged}),
        "command": (lambda option: _commanded(["evaluate", str(folder / "good.yaml"), *option]),
                    {"option": ("--n", "0")}, {"option": option}),
    }  # fmt: skip


RECIPE = """objective: {kind: w-trades, delta: 8/255, p: 2, steps: 2}
epochs: 3
lr: 1e-2
upsilon: {kind: full, every: 3}
optimiser: {kind: sgd}
"""
