"""Fine-tuning: the loop, its checkpoints, its history.

A run is a pure function of (network, data, recipe, seed): every step reseeds from (seed, step), so a run killed at
any moment and resumed ends with the same weights, bit for bit on a CPU, as an undisturbed one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.clock import spending
from wdat.records import write_tensors
from wdat.settings import read, reads
from wdat.threats import joint
from wdat.threats.ball import Threat, as_threat
from wdat.threats.checks import device_of, frozen, tensors_of
from wdat.threats.inputs import as_model, aside, copied, explained, optional, plain_weights, taking, unwrapped
from wdat.threats.losses import ce
from wdat.threats.seeds import derive_seed, reseed
from wdat.threats.sensitivity import input_gradient
from wdat.training.augmentation import shift_and_flip
from wdat.training.checkpoints import identify_run, load
from wdat.training.distributed import Team, joint_batch_norm, team
from wdat.training.history import refreshed, summary, training_norms, validate
from wdat.training.memory import check_memory, free_memory, training_cost
from wdat.training.recipes import Recipe, check_single_images, initialise, make_recipe
from wdat.training.schedules import get_schedule
from wdat.training.trackers import Tracker
from wdat.zoo.adapt import DataLike, as_data
from wdat.zoo.data import Data, check_fit, check_same_classes
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


@torch.no_grad()
def interpolate(before: nn.Module, after: nn.Module, share: float) -> nn.Module:
    """A network between two: weights and batch-norm statistics before + share * (after - before), in eval mode.

    share = 0 answers as `before`, 1 as `after`, which was fine-tuned from it; between, robustness is traded for clean
    accuracy without further training. With batch norm its statistics are those of neither set of activations. Weights
    that are computed (weight norm, spectral norm, any parametrisation) are those computed, and plain in the result.
    Source: Wortsman et al. 2109.01903 (of zero-shot networks). ValueError if the two are not of one architecture.

    >>> tuned = wdat.finetune(model, data, wdat.Recipe({"kind": "plain"}, epochs=1), progress=False).model
    >>> half = wdat.interpolate(model, tuned, 0.5)
    >>> torch.allclose(half[1].bias, (model[1].bias + tuned[1].bias) / 2)
    True
    """
    share = read(float, share, "interpolate: share")
    found, before = plain_weights(as_model(after)), plain_weights(as_model(before))
    first, last = before.state_dict(), found.state_dict()
    first, last = ({k: v for k, v in state.items() if isinstance(v, Tensor)} for state in (first, last))
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in last.items()}:
        raise ValueError("the networks differ in the names or shapes of their weights; pass two of one architecture")
    for name, end in last.items():  # the copy's own tensors
        if end.is_floating_point():
            end.copy_(torch.lerp(first[name].to(end.device), end, share))
    return found


@taking(model=as_model, train=as_data, validation=optional(as_data), validation_threat=optional(as_threat))
@reads("finetune")
@spending("training")
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

    Args:
        model: logits of float32 images in [0, 1]; trained on the device it is on. What torch.compile or DataParallel
            was put around is trained, and returned, without it. Of a `wdat.Randomised` network what is behind the noise
            is trained, with the recipe's noise or, if it has none, with its own, and returned behind it.
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

    >>> done = wdat.finetune(model, data, wdat.Recipe({"kind": "plain"}, epochs=2), progress=False)
    >>> [row["epoch"] for row in done.history]
    [1, 2]
    """
    base = model.network if isinstance(model, Randomised) else model
    recipe = recipe if base is model or recipe.noise else replace(recipe, noise=model.sigma)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={checkpoint_every} must be at least 1 step; leave it out for every epoch")
    with team() as workers:
        run = _Run(workers, base, train, recipe, validation, validation_threat, checkpoint)
        found = run.finetuned(checkpoint_every, progress, on_step)
    return found if base is model else replace(found, model=Randomised(found.model, model.sigma, model.seed))


class _Run:
    """One run, new or from its checkpoint: what it is given, what changes from step to step, and the steps."""

    def __init__(
        self, workers: Team, model: nn.Module, train: Data, recipe: Recipe, validation: Data | None,
        threat: Threat | None, checkpoint: str | Path | None,
    ) -> None:  # fmt: skip
        self.workers, self.model, self.train, self.recipe = workers, model, train, recipe
        self.validation, self.threat, self.checkpoint = validation, threat, checkpoint
        self.device, self.n = device_of(model), len(train)
        self.per_epoch = -(-self.n // recipe.batch_size)
        self.total = recipe.epochs * self.per_epoch
        check_fit(model, train, [term.threat for term in recipe.objective.terms])
        if validation is not None:
            with explained(model, validation):
                check_fit(model, validation)
            check_same_classes(train, validation)
        if not list(model.parameters()):
            raise ValueError("the model has no weights to train (a function, a frozen script); pass its nn.Module")
        check_single_images(model, recipe, train)
        workers.check(recipe, self.n)
        self.path = Path(checkpoint) if checkpoint and workers.rank == 0 else None  # the first reads and writes it
        self.identity = identify_run(model, train, recipe, validation, threat) if self.path else {}
        there = self.path and self.path.exists()
        self.saved = workers.same(load(self.path, self.identity) if there else None)
        if self.device.type == "cuda" and not self.saved:
            found = training_cost(model, recipe, train.pixels.shape[1:], self.n)
            room = free_memory(self.device) + found["bytes"]["parameters"] // 2  # the network itself is there
            check_memory(found, room)

    def finetuned(self, every: int | None, progress: bool, on_step: Callable | None) -> Finetuned:
        """All steps that are left; see `finetune`."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), ExitStack() as stack:
            self._begin(stack)
            stack.enter_context(self.workers.together(self._lost))
            hidden = not progress or self.workers.rank > 0
            bar = tqdm(
                desc=self.recipe.objective.name, unit="step", total=self.total, initial=self.done, disable=hidden
            )
            with bar:
                while self.done < self.total:
                    self._step()
                    bar.update()
                    if self.done % self.per_epoch == 0:
                        row = self._end_epoch()
                        bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.3f}")
                    elif every and self.done % every == 0:
                        self._save()
                    if on_step:
                        on_step(self.done, self.network, self.trackers)
        for own, found in zip(self.network.parameters(), self.model.parameters(), strict=True):
            own.requires_grad_(found.requires_grad)
            own.grad = None
        return Finetuned(unwrapped(self.network.eval()), self.history)

    def _begin(self, stack: ExitStack) -> None:
        """The copy that is trained and what goes with it, as new or as the checkpoint has them."""
        recipe, saved = self.recipe, self.saved
        self.teacher = as_model(copied(self.model)).eval().requires_grad_(False) if recipe.objective.distil else None
        self.network = as_model(copied(self.model))
        for own in (self.network, self.teacher) if self.teacher else (self.network,):
            stack.enter_context(aside(own))
        reseed(derive_seed(recipe.seed, -1), self.device)
        initialise(self.network, recipe.init, recipe.init_scale)
        recipe.select(self.network)
        self.weights = [w for w in self.network.parameters() if w.requires_grad]
        self.optimiser = recipe.optimiser.make(self.weights, recipe.lr, recipe.momentum, recipe.weight_decay)
        self.trackers, self.schedule = recipe.trackers(self.n), get_schedule(recipe.schedule)
        self.history, self.sums, self.done, self.kept, self.order = [], {}, 0, 0, None
        if saved:
            self.network.load_state_dict(saved["model"])
            self.optimiser.load_state_dict(saved["optimiser"])
            for tracker, state in zip(self.trackers, saved["trackers"], strict=True):
                if tracker:
                    tracker.load(state)
            self.history, self.done = saved["history"], saved["step"]
            self.sums = {k: v.to(self.device) for k, v in saved["sums"].items() if self.workers.rank == 0}
        self.module = self.workers.step(self.network, recipe, self._loss)
        stack.enter_context(joint_batch_norm(self.network))
        if not saved:
            self._save()  # a path that can not be written to is known now, not after an epoch

    def _loss(self, network: nn.Module, a: Tensor, b: Tensor, i: Tensor, *drawn: Tensor) -> tuple[Tensor, dict]:
        mode = network.train if self.recipe.layers == "all" else network.eval
        fixed = (self.trackers, self.teacher, mode, self.recipe.precision)
        return self.recipe.objective(
            network, a, b, i, *fixed, *drawn, sigma=self.recipe.noise, done=self.done / self.total
        )

    def _step(self) -> None:
        """One step, on the part of its batch that is here."""
        recipe, workers, n = self.recipe, self.workers, self.n
        self.epoch, position = divmod(self.done, self.per_epoch)
        if self.order is None or position == 0:
            drawn = torch.Generator().manual_seed(derive_seed(recipe.seed, -2 - self.epoch))
            self.order = torch.randperm(n, generator=drawn)
        index = self.order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
        rate = self.schedule(self.done / self.per_epoch, recipe.epochs, recipe.lr)
        self.rate = recipe.optimiser.rate(rate, (self.done + 1) / self.per_epoch, recipe.batch_size)
        self.optimiser.lr = self.rate
        places = workers.places(len(index), recipe.micro_batch)
        here = index[places]
        self.x, self.y = (t.to(self.device, non_blocking=True) for t in self.train.batch(here))
        workers.begin(self.done, self.device)
        with self._watched():
            for term, tracker in zip(recipe.objective.terms, self.trackers, strict=True):
                if tracker and term.tracked == "upsilon" and recipe.upsilon.due(self.done, self.per_epoch):
                    with refreshed(n, recipe) as some:
                        tracker.refresh(training_norms(self.network, self.train, some, term, recipe))
            reseed(derive_seed(recipe.seed, self.done), self.device)
            with joint.shared(len(index), places):
                self.x = shift_and_flip(self.x, recipe.augment, recipe.flip)
                noise = recipe.draw(self.x)
            self.optimiser.zero_grad()
            self._accumulate(index, (self.x, self.y, here, *noise))
            if recipe.clip:
                nn.utils.clip_grad_norm_(self.weights, recipe.clip)
            self.optimiser.step()
        self.done += 1

    def _accumulate(self, index: Tensor, batch: tuple[Tensor, ...]) -> None:
        """Gradients of the batch, micro-batch by micro-batch, and the sums to log."""
        sizes, at = [len(part) for part in index.split(self.recipe.micro_batch)], 0
        for number, size in enumerate(sizes, 1):
            part = joint.share(size)
            own, at = slice(at, at + part.stop - part.start), at + part.stop - part.start
            with joint.shared(size), self.workers.held_back(self.module, number == len(sizes)):
                loss, log = self.module(*(t[own] for t in batch))
                (loss * ((own.stop - own.start) * self.workers.size / len(index))).backward()
            for key, value in log.items():
                self.sums[key] = self.sums.get(key, 0) + value

    def _end_epoch(self) -> dict:
        """The epoch's row of the history. `Diverged` if its mean loss or a weight is not finite."""
        objective, workers = self.recipe.objective, self.workers
        row = summary(self.epoch, self.rate, workers.sums(self.sums), objective, self.trackers, self.n, self.history)
        if workers.traffic:
            row["sent_bytes"], workers.traffic.sent = workers.traffic.sent, 0.0
        if not math.isfinite(row["loss"]):
            raise self._diverged("the mean loss", f"{row['loss']}")
        if not all(torch.isfinite(t).all() for t in tensors_of(self.network).values()):
            raise self._diverged("a weight at the end", "no longer finite")
        if self.validation is not None:
            with self._watched():
                first = objective.terms[0].threat if objective.terms else None
                row |= validate(self.network, self.validation, self.threat or first, self.recipe)
        self.history.append(row)
        self.sums = {}
        self._save()
        return row

    def _save(self) -> None:
        self.kept, self.sums = self.done, self.workers.sums(self.sums)
        if self.workers.rank > 0:  # the first goes on with all of them
            self.sums = {key: torch.zeros_like(value) for key, value in self.sums.items()}
        if self.path:
            states = [t.state() if t else {} for t in self.trackers]
            write_tensors(self.path, {
                "identity": self.identity, "step": self.done, "history": self.history, "sums": self.sums,
                "trackers": states, "model": self.network.state_dict(), "optimiser": self.optimiser.state_dict(),
            })  # fmt: skip

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # a search or an attack refuses what a diverged network answers
            with frozen(self.network):
                gradient, _, logits = input_gradient(self.network, self.x, self.y, ce)
            if gradient.isfinite().all() & logits.isfinite().all():
                raise
            raise self._diverged(f"what the network answers around step {self.done}", "no longer finite") from error

    def _diverged(self, what: str, now: str) -> Diverged:
        remedy = f"lower lr={self.recipe.lr:g}" + ("" if self.recipe.clip else " or set clip=1")
        remedy += f" and delete {self.path}" if self.path else ""
        said = f"{what} of epoch {self.epoch + 1} is {now}: training diverged; {remedy}"
        return Diverged(said, self.epoch + 1, self.history)

    def _lost(self) -> str:
        how = f"goes on from step {self.kept} of {self.checkpoint}" if self.checkpoint else "starts anew, no checkpoint"
        return (
            f"a worker of {self.workers.size} ended in step {self.done + 1} of {self.total}, and the run with it; the "
            f"same command, with as many workers as there are, {how}"
        )
