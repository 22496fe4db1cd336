"""A second device without a GPU: tensors of the CPU that say they are on "cuda:0", and may not meet any that are not.

Their numbers are real, so that whatever the library does with a model there can be compared with what it does here.
Rules are those of PyTorch: only a CPU tensor without dimensions may meet one that is elsewhere, indices may be on the
CPU, copies go anywhere, a generator draws on its own device, and numpy sees the CPU alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

HERE, THERE = torch.device("cpu"), torch.device("cuda", 0)
# what makes the host wait for numbers of a tensor there; masks as indices, and copies to here, do so, too
READS = {"item", "tolist", "nonzero", "equal", "allclose", "masked_select", "unique"}
READS |= {"__bool__", "__int__", "__float__"}
ANYWHERE = {"copy_", "_foreach_copy_", "__set__", "_has_compatible_shallow_copy_type", "set_"}


class Elsewhere(TorchFunctionMode):
    """Inside, `model.to("cuda")` and device="cuda" work; `waits` counts how often the host waited for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.places = WeakTensorKeyDictionary()
        self.generators: dict[int, tuple[torch.Generator, torch.device]] = {}
        self.maker, self.waits = torch.Generator, 0

    def place(self, tensor: Tensor) -> torch.device:
        """Where it says it is."""
        return self.places.get(tensor, HERE)

    def put(self, result: object, place: torch.device) -> object:
        """The same, every tensor in it now on that device."""
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.places[leaf] = place
        return result

    def generator(self, device: object = HERE) -> torch.Generator:
        """Stands for `torch.Generator`."""
        made = self.maker()
        self.generators[id(made)] = made, _device(device)
        return made

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """What the function gives, or a RuntimeError for tensors that can not meet."""
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name == "__get__" and isinstance(args[0], Tensor):
            asked = getattr(func.__self__, "__name__", "")
            if asked in ("device", "is_cuda", "is_cpu"):
                place = self.place(args[0])
                return place if asked == "device" else place.type == asked.removeprefix("is_")
        if name in ("to", "cpu", "cuda"):
            return self.moved(name, *args, **kwargs)
        if name in ("numpy", "__array__") and self.place(args[0]) != HERE:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if name == "__deepcopy__":
            return self.put(func(*args), self.place(args[0]))
        if name == "register_hook":
            return func(args[0], self.inside(args[1], self.place(args[0])))
        if name == "__set__" and func.__self__ is Tensor.data:
            self.put(args[0], self.place(args[1]))
        wanted = kwargs.pop("device", None)
        if name in READS and any(self.place(t) != HERE for t in args if isinstance(t, Tensor)):
            self.waits += 1
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in ("__getitem__", "__setitem__"):
            self.check_index(name, args)
            place = self.place(args[0])
        else:
            strict = name in ("cat", "stack", "concat")
            places = {self.place(t) for t in tensors if strict or t.dim() or self.place(t) != HERE}
            if len(places) > 1 and name not in ANYWHERE:
                raise RuntimeError(f"{name}: all tensors must be on the same device, found {sorted(map(str, places))}")
            place = self.place(tensors[0]) if name in ANYWHERE and tensors else places.pop() if places else HERE
        if wanted is not None:
            place = _device(wanted)
        if (drawn := kwargs.get("generator")) is not None and self.generators[id(drawn)][1] != place:
            raise RuntimeError(f"{name}: a generator of {self.generators[id(drawn)][1]} can not draw on {place}")
        given = {id(t) for t in tensors}
        result = func(*args, **kwargs)
        fresh = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and id(t) not in given]
        self.put(fresh, place)
        return result

    def inside(self, hook: Callable[[Tensor], Tensor | None], place: torch.device) -> Callable[[Tensor], Tensor | None]:
        """A gradient's hook, which autograd calls outside any mode."""

        def called(gradient: Tensor) -> Tensor | None:
            with self:
                return hook(self.put(gradient, place))

        return called

    def check_index(self, name: str, args: tuple) -> None:
        """Indices on the CPU or beside what is indexed, and with them values beside it, too."""
        place = self.place(args[0])
        index = [t for t in pytree.tree_leaves(args[1]) if isinstance(t, Tensor)]
        self.waits += any(t.dtype == torch.bool and self.place(t) != HERE for t in index)
        if any(self.place(t) not in (HERE, place) for t in index):
            raise RuntimeError(f"{name}: indices on cuda:0 into a tensor on {place}")
        value = args[2] if name == "__setitem__" else None
        if index and isinstance(value, Tensor) and value.dim() and self.place(value) != place:
            raise RuntimeError(f"{name}: values on {self.place(value)}, indexed tensor on {place}")

    def moved(self, name: str, tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        """`to`, `cpu`, `cuda`: a copy if the device changes."""
        target = place = self.place(tensor)
        if name != "to":
            target = HERE if name == "cpu" else THERE
        kind = tensor.dtype
        for given in (*args, *(kwargs.get(key) for key in ("device", "dtype", "other"))):
            if isinstance(given, Tensor):
                target, kind = self.place(given), given.dtype
            elif isinstance(given, torch.dtype):
                kind = given
            elif isinstance(given, str | torch.device):
                target = _device(given)
        self.waits += (place, target) == (THERE, HERE)
        result = tensor.to(kind, copy=target != place or kwargs.get("copy", False))
        if kwargs.get("memory_format") is not None:
            result = result.contiguous(memory_format=kwargs["memory_format"])
        return result if result is tensor else self.put(result, target)


def _device(given: object) -> torch.device:
    device = torch.device(given)
    return THERE if device.type == "cuda" else device


@contextmanager
def elsewhere() -> Iterator[Elsewhere]:
    """The mode, with what else of torch would ask for a GPU."""
    mode, fork, autocast = Elsewhere(), torch.random.fork_rng, torch.autocast
    switch, switched, copied = torch.set_autocast_enabled, torch.is_autocast_enabled, nn.Parameter.__deepcopy__
    with pytest.MonkeyPatch.context() as patch:
        made = {"__new__": lambda _, device=HERE: mode.generator(device)}  # a class, since annotations name it
        patch.setattr(torch, "Generator", type("Generator", (), made))
        patch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: mode.put(copied(self, memo), mode.place(self)))
        patch.setattr(torch.random, "fork_rng", lambda devices=(), **_: fork(devices=[]))
        patch.setattr(torch, "autocast", lambda _, *args, **kwargs: autocast("cpu", *args, **kwargs))
        patch.setattr(torch, "set_autocast_enabled", lambda _, on: switch("cpu", on))
        patch.setattr(torch, "is_autocast_enabled", lambda *_: switched("cpu"))
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**11, 10**11))
        patch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
        with mode:
            yield mode


def moved(mode: Elsewhere, model: nn.Module) -> nn.Module:
    """The model, in place, elsewhere."""
    for tensor in (*model.parameters(), *model.buffers()):
        mode.put(tensor, THERE)
    return model
