"""Models: a card (YAML) with weights beside it, a RobustBench name, or any nn.Module. Weights are checked before use.

A card says what a network is and where it comes from:

    name, architecture, arguments    what `wdat.zoo.networks.build` makes: one of its networks by name, or
                                     package.module:function of your own, which is imported and called
    mean, std                        normalisation put in front, per channel; left out if the network needs none
    weights, sha256, bytes           file name (.pt or .safetensors), its digest and, optionally, its size; or
                                     package:NAME/PATH, a file that an installed package ships
    source, licence, training        who trained it, how, on what terms
    epsilon                          radius it was trained for, as written ("8/255"), if documented
    bias                             added to the logits, a number a class (`wdat.Biased`), if any
    sigma                            standard deviation of the noise in front of it (`wdat.Randomised`), if any
    density                          share of weights that are not zero, of a sparse network (`wdat.masked`)

Nothing is downloaded, and no folder is made while looking.
"""

import hashlib
import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from wdat.records import pick_device, write_file
from wdat.settings import Written, check_names, read
from wdat.threats.checks import tensors_of
from wdat.threats.inputs import as_model, plain_weights, unwrapped
from wdat.zoo import robustbench as rb
from wdat.zoo.networks import Biased, Normalised, build
from wdat.zoo.noise import Randomised
from wdat.zoo.sparse import check_density, is_masked, kept, pack
from wdat.zoo.weights import (
    WEIGHT_FILES,
    check_weights,
    fill,
    numpy_numbers,
    read_weights,
    refused,
    sha256,
    weight_file,
)  # fmt: skip

CARD = {
    "name": str, "architecture": str, "arguments": dict | None, "mean": list[Written] | None,
    "std": list[Written] | None, "weights": str, "sha256": str, "bytes": int | None, "source": str | None,
    "licence": str | None, "training": str | None, "epsilon": Written | None, "bias": list[float] | None,
    "sigma": float | None, "density": float | None,
}  # fmt: skip
REQUIRED = ("name", "architecture", "weights", "sha256")


def load_model(
    source: nn.Module | str | Path,
    *,
    root: str | Path | None = None,
    architecture: str | None = None,
    dataset: str = "cifar10",
    threat: str = "Linf",
    device: torch.device | str | None = None,
) -> nn.Module:
    """A classifier in eval mode: images (N, C, H, W) in [0, 1] -> logits.

    Args:
        source: an nn.Module (its parameters are checked to be finite; put into eval mode), the path of a card
            (NAME.yaml; weights under `root` if given, else beside it), "package.module:function" of your own (imported
            and called), a weight file together with `architecture`, or a RobustBench name.
        root: folder of the weights; for RobustBench its model folder ("models" by default), in which the weights are
            root/dataset/threat/NAME.pt.
        architecture: of a weight file: a name of `wdat.zoo.networks.build`, or "package.module:function".
        dataset, threat: RobustBench's, for example "cifar10", "Linf".
        device: where to put it; by default it stays where it is (loaded ones: the CPU).

    A loaded model has a dictionary `card`: what was loaded, from where, and the sha256 of the weights.
    Raises FileNotFoundError for missing cards and weights with the path expected, ValueError for anything wrong with
    them: HTML page, git-lfs pointer, truncated, altered, other keys or shapes, NaN; unknown names with the nearest.

    >>> wdat.load_model(model).training  # any nn.Module: checked, in eval mode
    False
    """
    if not isinstance(source, nn.Module | str | Path):
        raise ValueError(f"the model is a {type(source).__name__}; pass an nn.Module, the path of a card or a name")
    device = None if device is None else pick_device(device)
    file = not isinstance(source, nn.Module) and str(source).endswith(WEIGHT_FILES)
    if architecture is not None and not file:
        raise ValueError(f"architecture={architecture!r} is that of a weight file; {source} is none")
    if isinstance(source, nn.Module):
        model = source
    elif str(source).endswith((".yaml", ".yml")):
        model = _from_card(Path(source), root)
    elif file:
        model = _from_weights(Path(source), architecture)
    elif ":" in str(source):
        model = build(str(source))
        if not hasattr(model, "card"):
            model.card = {"name": str(source).rpartition(":")[2], "architecture": str(source)}
    else:
        model = _from_robustbench(str(source), Path(root or "models"), dataset, threat)
    for name, tensor in tensors_of(model).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{source if isinstance(source, (str, Path)) else 'the model'}: {name} holds NaN or infinity"
            )
    return (model if device is None else model.to(device)).eval()


def read_card(path: str | Path) -> dict[str, Any]:
    """The card as a dictionary. ValueError lists missing and unknown fields."""
    path = Path(path)
    if not path.is_file():
        remedy = "a card is a YAML file such as notebooks/zoo/*.yaml"
        if (made := re.search(r"\.wdat/([^/]+)/made/", path.as_posix())) is not None:
            remedy = f"notebook 00 trains that network: wdat reproduce --profile {made[1]} --only 00"
        raise FileNotFoundError(f"no model card at {path.absolute()}; {remedy}")
    try:
        card = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(card, dict):
        raise ValueError(f"{path} is no model card; it needs the fields {', '.join(REQUIRED)}")
    if missing := [field for field in REQUIRED if not card.get(field)]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    card = _typed(card, str(path))
    mean, std = card.get("mean"), card.get("std")
    if type(mean) is not type(std):
        raise ValueError(f"{path} has mean {mean} and std {std}; write both as lists, a number per channel, or neither")
    return card


def _typed(card: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a card, each of its kind. ValueError for one unknown or of another kind."""
    check_names(card, CARD, where)
    card = {name: read(CARD[name], value, f"{where}: {name}") for name, value in card.items()}
    if other := [name for name in card.get("arguments") or {} if not isinstance(name, str)]:
        raise ValueError(f"{where}: arguments has {other[0]!r}; expected names of arguments, in text")
    return card


def _from_card(path: Path, root: str | Path | None) -> nn.Module:
    card = read_card(path)
    weights = weight_file(card["weights"], path.parent if root is None else Path(root), card.get("source"))
    size = weights.stat().st_size
    if card.get("bytes") and size != card["bytes"]:
        raise ValueError(
            f"{weights} has {size:,} bytes, its card says {card['bytes']:,}: a broken or another file; fetch it again, "
            "or correct the card if it is the one you mean"
        )
    digest = sha256(weights)
    if digest != card["sha256"]:
        raise ValueError(
            f"{weights} has sha256 {digest}, its card {path.name} says {card['sha256']}; it was not loaded. Fetch it "
            "again, or correct the card if you changed the weights yourself"
        )
    network = build(card["architecture"], **card.get("arguments") or {}).float()
    fill(network, read_weights(weights), weights, card["architecture"])
    if card.get("density") is not None:
        check_density(network, card["density"], str(weights))
    model = network if card.get("mean") is None else Normalised(card["mean"], card["std"], network)
    model = model if card.get("bias") is None else Biased(model, card["bias"])
    model.card = card
    if card.get("sigma") is not None:
        model = Randomised(model, card["sigma"])
        model.card = card
    return model


def _from_weights(path: Path, architecture: str | None) -> nn.Module:
    if architecture is None:
        raise ValueError(
            f'{path} is a weight file; say whose weights these are: architecture="package.module:function" '
            "(in the shell --architecture package.module:function), or write a card for it and pass the card"
        )
    check_weights(path, "pass the path of the weight file")
    network = build(architecture).float()
    fill(network, read_weights(path), path, architecture)
    network.card = {"name": path.stem, "architecture": architecture, "weights": path.name, "sha256": sha256(path)}
    return network


def _from_robustbench(name: str, root: Path, dataset: str, threat: str) -> nn.Module:
    files = rb.weight_files(name, root, dataset, threat)
    for file in files:
        check_weights(
            file,
            f"download {name} ({dataset}, {threat}) from RobustBench's model zoo to that path, or pass as root the "
            "folder that holds DATASET/THREAT/NAME.pt",
        )
    try:
        with numpy_numbers():
            model = rb.load(name, root, dataset, threat)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{files[0]} {refused(files[0], error)}") from error
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{files[0]} does not fit {name}: {' '.join(str(error).split())[:400]}; it is damaged or another model's"
        ) from error
    digests = [sha256(file) for file in files]
    model.card = {
        "name": name,
        "architecture": "robustbench",
        "arguments": {"name": name, "dataset": dataset, "threat": threat},
        "weights": files[0].name,
        "sha256": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        "source": "RobustBench",
    }
    if (dataset, threat) == ("cifar10", "Linf") and name in rb.EPSILON:
        model.card["epsilon"] = rb.EPSILON[name]
    return model


def save_model(model: nn.Module, card_path: str | Path, **fields: Any) -> Path:
    """Write the weights (CARD.safetensors, beside the card) and the card; `load_model(card_path)` reads them back.

    fields: those of a card. `architecture` (a name, or "package.module:function" of yours that builds the network) and
    `arguments` are needed unless the model was loaded by `load_model`; mean and std come from a `Normalised` model,
    bias from a `Biased` one, sigma from a `Randomised` one, density from a masked one, of which the file holds the
    weights that are not zero and a bit for each place. ValueError unless that architecture takes exactly these
    weights. Both files appear whole or not at all, weights first.

    >>> from wdat.zoo.networks import build
    >>> small = {"architecture": "digits_cnn", "arguments": {"width": 2}}
    >>> card = wdat.save_model(build("digits_cnn", width=2), folder / "small.yaml", training="none", **small)
    >>> wdat.load_model(card).card["training"]
    'none'
    """
    from safetensors.torch import save

    path = read(Path, Path(card_path) if isinstance(card_path, str) else card_path, "save_model: card_path")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"a card is a YAML file, {path.name} is not; write NAME.yaml")
    fields = _typed(fields, "save_model")
    model = unwrapped(as_model(model))
    if isinstance(model, Randomised):
        fields["sigma"], model = model.sigma, model.network
    loaded = getattr(model, "card", {})
    if isinstance(model, Biased):
        fields["bias"], model = model.bias.tolist(), model.network
    loaded = getattr(model, "card", loaded)
    fields = {key: loaded[key] for key in ("architecture", "arguments") if key in loaded} | fields
    if "architecture" not in fields:
        raise ValueError("save_model needs architecture=... (and arguments=...), so that the weights can be read back")
    network, own = model, ":" in fields["architecture"] and "mean" not in loaded  # the function made the normalisation
    if isinstance(model, Normalised) and not own:
        network = model.network
        fields |= {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    if is_masked(network) or fields.get("density") is not None:  # counted, whatever was said
        network = plain_weights(network)
        found, total = kept(network)
        fields["density"] = found / total
    if other := sorted(set(network.state_dict()) - set(tensors_of(network))):
        raise ValueError(f"{', '.join(other)} of the model (get_extra_state) is no tensor, and a weight file of a card "
                         "holds tensors only; make it a buffer, or keep the state with torch.save")  # fmt: skip
    # weights that share memory are written one by one
    state = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
    with torch.random.fork_rng([]):
        fill(build(fields["architecture"], **fields.get("arguments") or {}), state, path, fields["architecture"])
    content = save(pack(state) if fields.get("density") is not None else state)
    weights = path.with_suffix(".safetensors")
    fields = {"name": path.stem} | fields
    fields |= {"weights": weights.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    write_file(weights, content)
    card = {key: fields[key] for key in CARD if key in fields}
    write_file(path, yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=120))
    return path


def export_robustbench(model: nn.Module, path: str | Path) -> Path:
    """Write a .pt that RobustBench's own loader reads as root/dataset/threat/NAME.pt.

    The network must be the one RobustBench builds for NAME, as `load_model(NAME)` or `build("robustbench", ...)`
    gives: its normalisation, if any, inside. A `Normalised` model is refused, for its loader would drop mean and std;
    for other tools, save `wdat.fold_normalisation(model)`.

    >>> wdat.export_robustbench(model, folder / "cifar10/Linf/Mine.pt").name
    'Mine.pt'
    """
    path, model = read(Path, Path(path) if isinstance(path, str) else path, "export: path"), as_model(model)
    if path.suffix != ".pt":
        raise ValueError(f"RobustBench reads NAME.pt, not {path.name}")
    if isinstance(model, Randomised):
        raise ValueError("RobustBench's loader would drop the noise; export the network inside, model.network")
    if isinstance(model, Biased):
        raise ValueError("RobustBench's loader would drop the bias; export the network inside, model.network, or add "
                         "the bias to that of its last layer first")  # fmt: skip
    if isinstance(model, Normalised):
        raise ValueError("RobustBench's networks hold their own normalisation, and its loader would drop that of "
                         "`Normalised`; wdat.fold_normalisation puts it into layers that other tools read")  # fmt: skip
    buffer = io.BytesIO()
    torch.save({"state_dict": {key: value.detach().cpu() for key, value in model.state_dict().items()}}, buffer)
    return write_file(path, buffer.getbuffer())
