"""Hostile files, made and given to what reads such files: each must be refused in a sentence, and nothing of it run."""

import io
import json
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import wdat
from benchmarks.trials.spoiled import tiny
from wdat import records
from wdat.training.recipes import make_recipe
from wdat.zoo.models import load_model, read_card, save_model
from wdat.zoo.networks import build

HTML = b"<!DOCTYPE html><html><title>Quota exceeded</title></html>"


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def trapped(folder: Path) -> bytes:
    """A file of torch.save that makes a file when it is unpickled."""
    buffer = io.BytesIO()
    torch.save({"identity": Trap(folder / "owned"), "logits": Trap(folder / "owned")}, buffer)
    return buffer.getvalue()


def bomb(good: bytes) -> bytes:
    """The same archive, its first tensor of 64 MB of zeros, packed."""
    made, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(good))
    with zipfile.ZipFile(made, "w") as archive:
        for name in source.namelist():
            big = name.endswith("data/0")
            content = b"\0" * 2**26 if big else source.read(name)
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if big else zipfile.ZIP_STORED)
    return made.getvalue()


def claims(size: int) -> bytes:
    """A safetensors file whose header says that it is so long."""
    return struct.pack("<Q", size) + b"{}"


LAUGHS = "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12))
LAUGHS = "a0: &a0 [1, 2, 3]\n" + LAUGHS + "name: *a11\narchitecture: *a11\nweights: *a11\nsha256: *a11\n"


def hostile(folder: Path) -> dict[str, Callable[[], Any]]:
    """By name: what must refuse."""
    model, card = build("digits_cnn"), folder / "net.yaml"
    save_model(model, card, architecture="digits_cnn")
    fields, buffer = read_card(card), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    good, network = buffer.getvalue(), tiny()
    here = wdat.from_tensors(torch.rand(6, 3, 6, 6), torch.arange(6) % 5)

    def put(name: str, content: bytes | str) -> Path:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def weights(name: str, content: bytes) -> Callable[[], nn.Module]:
        return lambda: load_model(put(name, content), architecture="digits_cnn")

    def carded(**changes: Any) -> Callable[[], nn.Module]:
        return lambda: load_model(put("bad.yaml", yaml.safe_dump(fields | changes)))

    def text(name: str, content: str, read: Callable[[Path], Any]) -> Callable[[], Any]:
        return lambda: read(put(name, content))

    def resumed(content: bytes) -> Callable[[], Any]:
        recipe = make_recipe({"objective": {"kind": "plain"}, "epochs": 1}, 0)
        return lambda: wdat.finetune(network, here, recipe, checkpoint=put("run.pt", content), progress=False)

    def kept(content: bytes) -> Callable[[], Any]:
        settings = {"steps": 1, "optimal": False, "losses": ("ce",), "progress": False, "state": folder / "state"}

        def run() -> Any:
            wdat.evaluate(network, here, "1/16", **settings)
            for path in (folder / "state").iterdir():
                path.write_bytes(content)
            return wdat.evaluate(network, here, "1/16", **settings)

        return run

    def linked() -> nn.Module:
        (folder / "link.safetensors").unlink(missing_ok=True)
        (folder / "link.safetensors").symlink_to("/etc/passwd")
        return carded(weights="link.safetensors")()

    deep = "[" * 100_000
    return {
        "pickle that runs code, as weights": weights("a.pt", trapped(folder)),
        "pickle that runs code, as a checkpoint": resumed(trapped(folder)),
        "pickle that runs code, as a kept part": kept(trapped(folder)),
        "archive that unpacks to a thousand times its size": weights("b.pt", bomb(good)),
        "the same as a checkpoint": resumed(bomb(good)),
        "header that claims 2^60 bytes": weights("c.safetensors", claims(2**60)),
        "HTML page, .pt": weights("d.pt", HTML), "HTML page, .safetensors": weights("d.safetensors", HTML),
        "truncated archive": weights("e.pt", good[:-500]), "one changed byte": weights("f.pt", changed(good)),
        "empty file": weights("g.pt", b""),
        "card whose weights lie above": carded(weights="../net.safetensors"),
        "card whose weights lie at the root": carded(weights="/etc/passwd"),
        "card whose weights leave a package": carded(weights="package:torch/../../secret.pt"),
        "card whose weights are a link elsewhere": linked,
        "card of endless aliases": text("h.yaml", LAUGHS, load_model),
        "recipe of endless aliases": lambda: make_recipe(yaml.safe_load(LAUGHS)["name"], 0),
        "card nested too deeply": text("i.yaml", deep[:5000], load_model),
        "record nested too deeply": text("j.json", deep, records.read),
        "record with NaN": text("k.json", '{"kind": "k", "schema": 1, "results": NaN}', records.read),
        "record that is an HTML page": text("l.json", HTML.decode(), records.read),
    }  # fmt: skip


def changed(content: bytes) -> bytes:
    """One bit in the middle, where the largest tensor lies."""
    found = bytearray(content)
    found[len(found) // 2] ^= 1
    return bytes(found)


def given(folder: Path, read: Callable[[], Any]) -> dict[str, Any]:
    """What became of one file: the sentence, if it was refused, and seconds; whether anything of it ran."""
    begun = time.perf_counter()
    try:
        found = f"taken: {type(read()).__name__}"
        refused = False
    except (ValueError, OSError) as error:
        found, refused = " ".join(str(error).replace(str(folder), ".").split()), True
    except Exception as error:
        found, refused = f"{type(error).__name__}: {error}", False
    ran = (folder / "owned").exists()
    return {"refused": refused, "ran": ran, "seconds": round(time.perf_counter() - begun, 2), "said": found[:300]}


def run(folder: Path, quick: bool) -> dict[str, Any]:
    """All files, quick or not: seconds."""
    rows = [{"file": name, **given(folder, read)} for name, read in hostile(folder).items()]
    print(json.dumps([row for row in rows if not row["refused"] or row["ran"]]), flush=True)
    return {"files": rows}
