"""Fine-tuning: the loop, its checkpoints, its history.

A run is a pure function of (network, data, recipe, seed): every step reseeds from (seed, step), so a run killed at
any moment and resumed ends with the same weights, bit for bit on a CPU, as an undisturbed one.
Source: arXiv 2502.09352; defaults of TRADES (arXiv 1901.08573).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.records import write_tensors
from wdat.threats import joint
from wdat.threats.ball import Threat, as_threat, per_image
from wdat.threats.checks import device_of, frozen, tensors_of
from wdat.threats.inputs import as_model, aside, copied, optional, plain_weights, taking, unwrapped
from wdat.threats.losses import ce
from wdat.threats.seeds import derive_seed
from wdat.threats.sensitivity import input_gradient
from wdat.training.checkpoints import identify_run, load
from wdat.training.distributed import Team, joint_batch_norm, team
from wdat.training.history import refreshed, summary, training_norms, validate
from wdat.training.memory import check_memory, free_memory, training_cost
from wdat.training.recipes import Recipe, check_single_images, initialise, make_recipe
from wdat.training.schedules import get_schedule
from wdat.training.trackers import Tracker
from wdat.zoo.adapt import DataLike, as_data
from wdat.zoo.data import Data, check_fit, check_outputs, check_same_classes

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
        draw = partial(torch.randint, 0, 2 * shift + 1, device=x.device)
        top, left = joint.drawn(lambda shape: draw((2, *shape)).movedim(0, 1), (n, 1)).unbind(1)
        rows = (top + torch.arange(h, device=x.device))[:, None, :, None]
        columns = (left + torch.arange(w, device=x.device))[:, None, None, :]
        channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        x = padded[torch.arange(n, device=x.device)[:, None, None, None], channels, rows, columns]
    if flip:
        x = torch.where(
            per_image(joint.drawn(partial(torch.rand, device=x.device), (n,)) < 0.5, x).bool(), x.flip(3), x
        )
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

    In processes started by torchrun, or that share a group of torch.distributed, they do it together, each batch shared
    out among them, and all return the same: that of one process, but for rounding (`wdat.training.distributed`). The
    first writes the checkpoint, from which any number of workers goes on. `WorkerLost` if one of them ends.

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
    with team() as workers:
        return _finetune(
            workers,
            model,
            train,
            recipe,
            validation,
            validation_threat,
            checkpoint,
            checkpoint_every,
            progress,
            on_step,
        )


def _finetune(
    workers: Team, model: nn.Module, train: Data, recipe: Recipe, validation: Data | None,
    validation_threat: Threat | None, checkpoint: str | Path | None, checkpoint_every: int | None, progress: bool,
    on_step: Callable | None,
) -> Finetuned:  # fmt: skip
    device, n = device_of(model), len(train)
    classes = check_fit(model, train, [term.threat for term in recipe.objective.terms])
    if validation is not None:
        check_outputs(validation, classes)
        check_same_classes(train, validation)
    if not list(model.parameters()):
        raise ValueError("the model has no weights to train (a function, a frozen script); pass its nn.Module")
    check_single_images(model, recipe, train)
    workers.check(recipe, n)
    steps_per_epoch = -(-n // recipe.batch_size)
    objective, schedule = recipe.objective, get_schedule(recipe.schedule)
    path = Path(checkpoint) if checkpoint and workers.rank == 0 else None  # the first reads and writes it
    identity = identify_run(model, train, recipe, validation, validation_threat) if path else {}
    saved = workers.same(load(path, identity) if path and path.exists() else None)
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
        optimiser = recipe.optimiser.make(weights, recipe.lr, recipe.momentum, recipe.weight_decay)
        trackers = recipe.trackers(n)
        history, sums, done, kept, order = [], {}, 0, 0, None
        if saved:
            network.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            for tracker, state in zip(trackers, saved["trackers"], strict=True):
                if tracker:
                    tracker.load(state)
            history, done = saved["history"], saved["step"]
            sums = {key: value.to(device) for key, value in saved["sums"].items() if workers.rank == 0}

        def save() -> None:
            nonlocal kept, sums
            kept, sums = done, workers.sums(sums)
            if workers.rank > 0:  # the first goes on with all of them
                sums = {key: torch.zeros_like(value) for key, value in sums.items()}
            if path:
                states = [t.state() if t else {} for t in trackers]
                write_tensors(path, {
                    "identity": identity, "step": done, "history": history, "sums": sums, "trackers": states,
                    "model": network.state_dict(), "optimiser": optimiser.state_dict(),
                })  # fmt: skip

        mode = network.train if recipe.layers == "all" else network.eval

        def loss_of(network: nn.Module, a: Tensor, b: Tensor, i: Tensor, *drawn: Tensor) -> tuple[Tensor, dict]:
            fixed = (trackers, teacher, mode, recipe.precision)
            return objective(network, a, b, i, *fixed, *drawn, sigma=recipe.noise)

        step = workers.step(network, recipe, loss_of)
        stack.enter_context(joint_batch_norm(network))
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

        def lost() -> str:
            how = f"goes on from step {kept} of {checkpoint}" if checkpoint else "starts anew, without a checkpoint"
            return (
                f"a worker of {workers.size} ended in step {done + 1} of {total}, and the run with it; the same "
                f"command, with as many workers as there are, {how}"
            )

        total = recipe.epochs * steps_per_epoch
        stack.enter_context(workers.together(lost))
        shown = {"desc": objective.name, "unit": "step", "disable": not progress or workers.rank > 0}
        with tqdm(total=total, initial=done, **shown) as bar:
            while done < total:
                epoch, position = divmod(done, steps_per_epoch)
                if order is None or position == 0:
                    drawn = torch.Generator().manual_seed(derive_seed(recipe.seed, -2 - epoch))
                    order = torch.randperm(n, generator=drawn)
                index = order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
                rate = schedule(done / steps_per_epoch, recipe.epochs, recipe.lr)
                rate = recipe.optimiser.rate(rate, (done + 1) / steps_per_epoch, recipe.batch_size)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                places = workers.places(len(index), recipe.micro_batch)
                here = index[places]
                x, y = (t.to(device, non_blocking=True) for t in train.batch(here))
                workers.begin(done, device)
                with watched():
                    for term, tracker in zip(objective.terms, trackers, strict=True):
                        if tracker and term.tracked == "upsilon" and recipe.upsilon.due(done, steps_per_epoch):
                            with refreshed(n, recipe) as some:
                                tracker.refresh(training_norms(network, train, some, term, recipe))
                    torch.manual_seed(derive_seed(recipe.seed, done))
                    with joint.shared(len(index), places):
                        x = shift_and_flip(x, recipe.augment, recipe.flip)
                        noise = recipe.draw(x)
                    optimiser.zero_grad(set_to_none=True)
                    sizes, at = [len(part) for part in index.split(recipe.micro_batch)], 0
                    for number, size in enumerate(sizes, 1):
                        part = joint.share(size)
                        own, at = slice(at, at + part.stop - part.start), at + part.stop - part.start
                        batch = (t[own] for t in (x, y, here, *noise))
                        with joint.shared(size), workers.held_back(step, number == len(sizes)):
                            loss, log = step(*batch)
                            (loss * ((own.stop - own.start) * workers.size / len(index))).backward()
                        for key, value in log.items():
                            sums[key] = sums.get(key, 0) + value
                    if recipe.clip:
                        nn.utils.clip_grad_norm_(weights, recipe.clip)
                    optimiser.step()
                done += 1
                bar.update()
                if done % steps_per_epoch == 0:
                    row = summary(epoch, rate, workers.sums(sums), objective, trackers, n, history)
                    if workers.traffic:
                        row["sent_bytes"], workers.traffic.sent = workers.traffic.sent, 0.0
                    if not math.isfinite(row["loss"]):
                        raise diverged("the mean loss", f"{row['loss']}")
                    if not all(torch.isfinite(t).all() for t in tensors_of(network).values()):
                        raise diverged("a weight at the end", "no longer finite")
                    if validation is not None:
                        with watched():
                            first = objective.terms[0].threat if objective.terms else None
                            row |= validate(network, validation, validation_threat or first, recipe)
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
