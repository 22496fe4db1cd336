"""Fine-tuning: the loop, its checkpoints, its history.

A run is a pure function of (network, data, recipe, seed): every step reseeds from (seed, step), so a run killed at
any moment and resumed ends with the same weights, bit for bit on a CPU, as an undisturbed one.
Source: arXiv 2502.09352; defaults of TRADES (arXiv 1901.08573).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.attacks.pgd import w_pgd
from wdat.digest import version
from wdat.records import write_tensors
from wdat.threats.ball import Threat, as_threat, per_image
from wdat.threats.checks import device_of, frozen, tensors_of
from wdat.threats.inputs import as_model, aside, copied, optional, plain_weights, taking, unwrapped
from wdat.threats.losses import ce, margin
from wdat.threats.seeds import derive_seed
from wdat.threats.sensitivity import dual_norms, input_gradient
from wdat.training.memory import check_memory, free_memory, training_cost
from wdat.training.objectives import Objective
from wdat.training.recipes import Recipe, check_single_images, initialise, make_recipe
from wdat.training.schedules import get_schedule
from wdat.training.trackers import Tracker
from wdat.zoo.adapt import DataLike, as_data
from wdat.zoo.data import Data, check_fit, check_outputs, check_same_classes
from wdat.zoo.identity import identify, same
from wdat.zoo.noise import Randomised

__all__ = ["Diverged", "Finetuned", "Recipe", "finetune", "interpolate", "make_recipe"]


class Diverged(ValueError):
    """Training diverged in `epoch` (from 1); `history` holds the rows of the epochs before it."""

    def __init__(self, message: str, epoch: int = 0, history: Sequence[dict] = ()) -> None:
        super().__init__(message)
        self.epoch, self.history = epoch, list(history)


@dataclass(frozen=True)
class Finetuned:
    """The network (in eval mode) and one row of plain numbers per epoch."""

    model: nn.Module
    history: list[dict]


def shift_and_flip(x: Tensor, shift: int, flip: bool) -> Tensor:
    """Random crop after zero padding by `shift` pixels, and mirroring, image by image: (N, C, H, W) -> the same."""
    n, _, h, w = x.shape
    if shift:
        padded = nn.functional.pad(x, (shift,) * 4)
        top, left = torch.randint(0, 2 * shift + 1, (2, n, 1), device=x.device)
        rows = (top + torch.arange(h, device=x.device))[:, None, :, None]
        columns = (left + torch.arange(w, device=x.device))[:, None, None, :]
        channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        x = padded[torch.arange(n, device=x.device)[:, None, None, None], channels, rows, columns]
    if flip:
        x = torch.where(per_image(torch.rand(n, device=x.device) < 0.5, x).bool(), x.flip(3), x)
    return x


@torch.no_grad()
def interpolate(before: nn.Module, after: nn.Module, share: float) -> nn.Module:
    """A network between two: weights and batch-norm statistics before + share * (after - before), in eval mode.

    share = 0 answers as `before`, 1 as `after`, which was fine-tuned from it; between, robustness is traded for clean
    accuracy without further training. With batch norm its statistics are those of neither set of activations. Weights
    that are computed (weight norm, spectral norm, any parametrisation) are those computed, and plain in the result.
    Source: Wortsman et al. 2109.01903 (of zero-shot networks). ValueError if the two are not of one architecture.
    """
    found, before = plain_weights(after), plain_weights(before)
    first, last = before.state_dict(), found.state_dict()
    first, last = ({k: v for k, v in state.items() if isinstance(v, Tensor)} for state in (first, last))
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in last.items()} or not math.isfinite(share):
        raise ValueError(f"share={share} must be a number, and both networks of one architecture")
    for name, end in last.items():  # the copy's own tensors
        if end.is_floating_point():
            end.copy_(torch.lerp(first[name].to(end.device), end, share))
    return found


@taking(model=as_model, train=as_data, validation=optional(as_data), validation_threat=optional(as_threat))
def finetune(
    model: nn.Module,
    train: DataLike,
    recipe: Recipe,
    *,
    validation: DataLike | None = None,
    validation_threat: Threat | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
    on_step: Callable[[int, nn.Module, list[Tracker | None]], None] | None = None,
) -> Finetuned:
    """Fine-tune a copy of the network; the one passed, and torch's global seed, are left as found.

    What torch.compile or DataParallel was put around is trained, and returned, without it.

    Args:
        model: logits of float32 images in [0, 1]; trained on the device it is on.
        train, validation: data sets. Validation (cut from training data, never test) is only reported: clean and
            W-PGD accuracy (10 steps, under `validation_threat`, by default the first term's) per epoch, with noise in
            the recipe the accuracy of one draw alone; the final weights are returned, never the best ones.
        checkpoint: file to resume from and write to, after every epoch and, if given, every `checkpoint_every` steps.
            Written atomically; one of another recipe, network (`wdat.zoo.identity`), data, validation or version of the
            library is refused, naming what differs.
        on_step: called after each step with the number of steps done, the network and the trackers, to look at only.

    History rows: epoch, lr, loss, train accuracy, tracked scalars, realised delta (mean eps^p)^(1/p), cap rate, idle
    rate (zero budgets), mean gradient norm and its ratio to the first epoch's (a masking alarm), validation.
    Raises: ValueError for a network, images, labels or a checkpoint that do not fit; `Diverged`, which is one, when an
    epoch's mean loss or a weight is no longer finite (looked at when an epoch ends, and when a step fails).
    """
    device, n = device_of(model), len(train)
    classes = check_fit(model, train, [term.threat for term in recipe.objective.terms])
    if validation is not None:
        check_outputs(validation, classes)
        check_same_classes(train, validation)
    if not list(model.parameters()):
        raise ValueError("the model has no weights to train (a function, a frozen script); pass its nn.Module")
    check_single_images(model, recipe, train)
    steps_per_epoch = -(-n // recipe.batch_size)
    objective, schedule = recipe.objective, get_schedule(recipe.schedule)
    path = Path(checkpoint) if checkpoint else None
    identity = _identity(model, train, recipe, validation, validation_threat) if path else {}
    saved = _load(path, identity) if path and path.exists() else None
    if device.type == "cuda" and not saved:
        found = training_cost(model, recipe, train.pixels.shape[1:], n)
        check_memory(found, free_memory(device) + found["bytes"]["parameters"] // 2)  # the network itself is there

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), ExitStack() as stack:
        teacher = as_model(copied(model)).eval().requires_grad_(False) if objective.distil else None
        network = as_model(copied(model))
        for own in (network, teacher) if teacher else (network,):
            stack.enter_context(aside(own))
        torch.manual_seed(derive_seed(recipe.seed, -1))
        initialise(network, recipe.init, recipe.init_scale)
        recipe.select(network)
        weights = [w for w in network.parameters() if w.requires_grad]
        optimiser = torch.optim.SGD(weights, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
        trackers = recipe.trackers(n)
        history, sums, done, order = [], {}, 0, None
        if saved:
            network.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            for tracker, state in zip(trackers, saved["trackers"], strict=True):
                if tracker:
                    tracker.load(state)
            history, done = saved["history"], saved["step"]
            sums = {key: value.to(device) for key, value in saved["sums"].items()}

        def save() -> None:
            if path:
                states = [t.state() if t else {} for t in trackers]
                write_tensors(path, {
                    "identity": identity, "step": done, "history": history, "sums": sums, "trackers": states,
                    "model": network.state_dict(), "optimiser": optimiser.state_dict(),
                })  # fmt: skip

        if not saved:
            save()  # a path that can not be written to is known now, not after an epoch

        def diverged(what: str, now: str) -> Diverged:
            remedy = f"lower lr={recipe.lr:g}" + ("" if recipe.clip else " or set clip=1")
            remedy += f" and delete {path}" if path else ""
            return Diverged(f"{what} of epoch {epoch + 1} is {now}: training diverged; {remedy}", epoch + 1, history)

        @contextmanager
        def watched() -> Iterator[None]:
            try:
                yield
            except ValueError as error:  # a search or an attack refuses what a diverged network answers
                if _finite(network, x, y):
                    raise
                raise diverged(f"what the network answers around step {done}", "no longer finite") from error

        total = recipe.epochs * steps_per_epoch
        with tqdm(total=total, initial=done, desc=objective.name, unit="step", disable=not progress) as bar:
            while done < total:
                epoch, position = divmod(done, steps_per_epoch)
                if order is None or position == 0:
                    drawn = torch.Generator().manual_seed(derive_seed(recipe.seed, -2 - epoch))
                    order = torch.randperm(n, generator=drawn)
                index = order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
                rate = schedule(done / steps_per_epoch, recipe.epochs, recipe.lr)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                x, y = (t.to(device, non_blocking=True) for t in train.batch(index))
                with watched():
                    for term, tracker in zip(objective.terms, trackers, strict=True):
                        if tracker and term.tracked == "upsilon" and recipe.upsilon.due(done, steps_per_epoch):
                            tracker.refresh(_norms(recipe.behind(network, train), train, term, recipe))
                    torch.manual_seed(derive_seed(recipe.seed, done))
                    x = shift_and_flip(x, recipe.augment, recipe.flip)
                    drawn = recipe.draw(x)
                    mode = network.train if recipe.layers == "all" else network.eval
                    optimiser.zero_grad(set_to_none=True)
                    micro = recipe.micro_batch
                    parts = (t.split(micro) for t in (x, y, index, *drawn))
                    for a, b, i, *xi in zip(*parts, strict=True):
                        loss, log = objective(
                            network, a, b, i, trackers, teacher, mode, recipe.precision, *xi, sigma=recipe.noise
                        )
                        (loss * (len(a) / len(x))).backward()
                        for key, value in log.items():
                            sums[key] = sums.get(key, 0) + value
                    if recipe.clip:
                        nn.utils.clip_grad_norm_(weights, recipe.clip)
                    optimiser.step()
                done += 1
                bar.update()
                if done % steps_per_epoch == 0:
                    row = _summary(epoch, rate, sums, objective, trackers, n, history)
                    if not math.isfinite(row["loss"]):
                        raise diverged("the mean loss", f"{row['loss']}")
                    if not all(torch.isfinite(t).all() for t in tensors_of(network).values()):
                        raise diverged("a weight at the end", "no longer finite")
                    if validation is not None:
                        with watched():
                            threat = validation_threat or _first_threat(objective)
                            row |= _validate(network, validation, threat, recipe)
                    history.append(row)
                    bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.3f}")
                    sums = {}
                    save()
                elif checkpoint_every and done % checkpoint_every == 0:
                    save()
                if on_step:
                    on_step(done, network, trackers)
    for own, found in zip(network.parameters(), model.parameters(), strict=True):
        own.requires_grad_(found.requires_grad)
        own.grad = None
    return Finetuned(unwrapped(network.eval()), history)


def _finite(network: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether logits and their gradients in the images are finite."""
    with frozen(network):
        gradient, _, logits = input_gradient(network, x, y, ce)
    return bool(gradient.isfinite().all() & logits.isfinite().all())


def _norms(network: nn.Module, train: Data, term: object, recipe: Recipe) -> Tensor:
    """Dual norms on the training set, or on the rule's random subset of it, the same at every refresh."""
    n = len(train)
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, -1))
    count = min(recipe.upsilon.subset or n, n)
    index = torch.randperm(n, generator=generator)[:count] if count < n else torch.arange(n)
    parts = [
        dual_norms(network, *train.batch(i), term.threat, term.budget_loss, recipe.micro_batch)
        for i in index.split(2048)
    ]
    return torch.cat(parts)


def _summary(
    epoch: int, rate: float, sums: dict, objective: Objective, trackers: list, n: int, history: list[dict]
) -> dict:
    """One row of plain numbers from the epoch's sums."""
    mean = {key: float(value) / n for key, value in sums.items()}
    row = {"epoch": epoch + 1, "lr": rate, "loss": mean["loss"], "accuracy": mean["correct"], "terms": []}
    for number, (term, tracker) in enumerate(zip(objective.terms, trackers, strict=True)):
        own = {key.split(".", 1)[1]: value for key, value in mean.items() if key.startswith(f"{number}.")}
        order = 1.0 if term.threat.pointwise else term.threat.p
        facts = {"threat": str(term.threat), "moved": own["moved^p"] ** (1 / order)}
        if "epsilon^p" in own:
            facts["realised_delta"] = own["epsilon^p"] ** (1 / order)
        if tracker:
            facts[term.tracked] = float(tracker.value)
        facts |= {key: own[key] for key in ("capped", "idle", "norm") if key in own}
        if "norm" in own:
            first = history[0]["terms"][number]["norm"] if history else own["norm"]
            facts["norm_ratio"] = own["norm"] / first if first else 1.0
        row["terms"].append(facts)
    return row


def _first_threat(objective: Objective) -> Threat | None:
    return objective.terms[0].threat if objective.terms else None


def _validate(network: nn.Module, data: Data, threat: Threat | None, recipe: Recipe) -> dict:
    size, shown = recipe.micro_batch, Randomised(network, recipe.noise) if recipe.noise else network
    with frozen(network), torch.no_grad():
        logits = torch.cat([shown(x.to(device_of(network))) for x in data.x.split(size)])
    row = {"validation_accuracy": float((margin(logits, data.y.to(logits.device)) > 0).double().mean())}
    if threat and not recipe.noise:
        loss = "redlr" if logits.shape[1] > 2 else "negative-margin"
        found = w_pgd(network, data.x, data.y, threat, loss=loss, steps=10, batch_size=size)
        row["validation_w_pgd"] = found.accuracy
    return row


def _identity(
    model: nn.Module, train: Data, recipe: Recipe, validation: Data | None, threat: Threat | None
) -> dict[str, str | Tensor]:
    """What a checkpoint belongs to, as text, so that a mismatch can be named; and the network's logits."""
    made_of, logits = identify(model, train)
    facts = {key: repr(value) for key, value in asdict(replace(recipe, objective=Objective(""))).items()}
    return facts | {
        "objective": repr(recipe.objective), "network": made_of, "logits": logits, "data": train.sha256,
        "validation": f"{validation.sha256} {threat!r}" if validation else "none",
        "library": version(f"{__name__}.finetune"),
    }  # fmt: skip


def _load(path: Path, identity: dict[str, str | Tensor]) -> dict:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["identity"]
        changed = [] if same(identity["logits"], theirs.get("logits", torch.empty(0))) else ["logits"]
    except Exception as error:
        raise ValueError(
            f"checkpoint {path} can not be read ({type(error).__name__}); delete it to start anew"
        ) from error
    changed = [k for k in identity if k != "logits" and theirs.get(k) != identity[k]] or changed
    if changed:
        before, now = ({k: " ".join(str(facts.get(k)).split())[:60] for k in changed} for facts in (theirs, identity))
        shown = "; ".join(f"{k}: {before[k]} -> {now[k]}" for k in changed)
        raise ValueError(f"checkpoint {path} belongs to another run ({shown}); delete it or name another file")
    return saved
