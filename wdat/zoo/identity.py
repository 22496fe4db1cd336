"""Which function a network is: what it is made of, and what it answers to a few of the images in question.

Weights do not tell: a normalisation held as a plain attribute, a buffer that is not saved, another activation or
another `forward` change every answer. So a network is known by what it is made of, a digest of its weights, all its
buffers, the plain attributes and the bytecode of all its modules, *and* by its answers, the logits on images of the
very set. What a digest can not see shows in the logits, which are compared up to the rounding of another device or
number of threads.
"""

import enum
import functools
import hashlib
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wdat.digest import text_digest
from wdat.threats.checks import check_logits, device_of, frozen
from wdat.zoo.data import Data

FEW = 8  # images of a set that are answered
ROUNDING = 1e-4  # of the largest logit: below it, logits are those of the same function in another order of summation
FOREIGN = {"torch", "numpy", *sys.stdlib_module_names}  # their code is told by their version
PLAIN = (
    int, float, complex, str, bytes, type(None), type(...), range, slice, enum.Enum, pathlib.PurePath,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
OWN = set(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}  # torch's: modes, hooks


def identify(model: nn.Module, data: Data) -> tuple[str, Tensor]:
    """What a network is made of, as a digest, and its `answers` on a set.

    What a pass itself changes (a counter, what is kept of the last images) is not part of the function. Hooks are not
    either, but for what they do to the logits.
    """
    logits, first = answers(model, data), _Facts().of(model)
    answers(model, data, lambda x: 1 - x)
    second = _Facts().of(model)
    return text_digest(repr(sorted(first.items() & second.items()))), logits


@torch.no_grad()
def answers(model: nn.Module, data: Data, change: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
    """Logits of up to `FEW` images spread over the set, float32 (n, m) on the CPU: one pass, of one size always."""
    x, _ = data.batch(torch.linspace(0, len(data) - 1, min(FEW, len(data))).long())
    exact = torch.backends.cudnn.flags(torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False)
    with frozen(model), exact:  # a GPU's short multiplications would be told from a CPU's
        logits = model(change(x).to(device_of(model)))
    check_logits(logits, len(x))
    return logits.float().cpu()


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two networks gave these logits to the same images, or one did twice."""
    return one.shape == other.shape and bool((one - other).abs().max() <= ROUNDING * other.abs().max())


def value_digest(value: Any) -> str:
    """Digest of numbers, text, tensors, functions, modules, and of lists, dicts and objects of them."""
    return text_digest(repr(sorted(_Facts().of(value).items())))


class _Facts:
    """A line of text for everything that a value is made of, by the path that leads there.

    Never the address of an object, which differs from run to run; what has nothing to show is told by its type.
    """

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}
        self.seen: dict[int, tuple[Any, str]] = {}  # with the object, so that its id is not given to another

    def of(self, value: Any) -> dict[str, str]:
        self.add(value, "")
        return self.lines

    def add(self, value: Any, path: str) -> None:
        name = type(value).__qualname__
        if isinstance(value, PLAIN):
            self.lines[path] = f"{name} {value!r}"
        elif isinstance(value, (tuple, types.CodeType)):  # whether equal ones are one object is chance
            self.lines[path] = name
            self._inside(value, path)
        elif id(value) in self.seen:
            self.lines[path] = f"as {self.seen[id(value)][1]}"
        else:
            self.seen[id(value)], self.lines[path] = (value, path), name
            self._inside(value, path)

    def _inside(self, value: Any, path: str) -> None:
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            self.lines[path] = _array(value)
        elif isinstance(value, dict):
            for number, (key, one) in enumerate(value.items()):
                self.add(one, f"{path}[{key!r}]" if isinstance(key, PLAIN) else f"{path}[{number}]")
        elif isinstance(value, (list, tuple)):
            self._all({f"[{number}]": one for number, one in enumerate(value)}, path)
        elif isinstance(value, (set, frozenset)):
            self.lines[path] += " " + " ".join(sorted(value_digest(one) for one in value))
        elif isinstance(value, types.CodeType):
            self.lines[path] += f" {value.co_code.hex()} {value.co_names} {value.co_freevars}"
            self._all({f"[{number}]": one for number, one in enumerate(value.co_consts)}, path)
        elif isinstance(value, types.FunctionType):
            self._function(value, path)
        elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
            self._all({"()": value.__func__, ".self": getattr(value, "__self__", None)}, path)
        elif isinstance(value, functools.partial):
            self._all({"()": value.func, ".args": value.args, ".keywords": value.keywords}, path)
        elif isinstance(value, property):
            self.add(value.fget, f"{path}()")
        elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            self.lines[path] += f" {getattr(value, '__module__', '')} {getattr(value, '__qualname__', value.__name__)}"
            if isinstance(value, type):
                self._class(value, path)
        elif type(value).__qualname__ == "OptimizedModule":  # of torch.compile, whose own attributes are addresses
            self.add(value._orig_mod, f"{path}()")
        elif isinstance(value, torch.jit.ScriptModule):
            self._all({"()": getattr(value, "code", ""), ".state": dict(value.named_parameters())}, path)
            self._all({".buffers": dict(value.named_buffers())}, path)
        elif isinstance(value, nn.Module) or not _foreign(type(value)):
            self.add(type(value), f"{path}()")
            skipped = OWN if isinstance(value, nn.Module) else ()
            self._all({f".{k}": v for k, v in getattr(value, "__dict__", {}).items() if k not in skipped}, path)

    def _all(self, found: dict[str, Any], path: str) -> None:
        for name, value in found.items():
            self.add(value, path + name)

    def _class(self, value: type, path: str) -> None:
        """What a class and those it comes from define; attributes that `__init__` sets are the objects' own."""
        for base in value.__mro__:
            if not _foreign(base):
                own = {k: v for k, v in vars(base).items() if not k.startswith(("__", "_abc_")) or k == "__call__"}
                self._all({f".{base.__qualname__}.{k}": v for k, v in own.items()}, path)

    def _function(self, value: types.FunctionType, path: str) -> None:
        """Code, defaults, what it closes over, and the constants, functions and classes of its module that it names."""
        self.lines[path] += f" {value.__module__} {value.__qualname__}"
        if _foreign(value):
            return
        self._all({".code": value.__code__, "=": value.__defaults__, "*=": value.__kwdefaults__}, path)
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        self._all({f".{name}": cell.cell_contents for name, cell in cells if cell != types.CellType()}, path)
        named = {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
        told = (*PLAIN, tuple, Tensor, np.ndarray, types.FunctionType, type)
        self._all({f":{name}": one for name, one in named.items() if isinstance(one, told)}, path)


def _foreign(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "builtins").split(".")[0] in FOREIGN


def _array(value: Tensor | np.ndarray | np.generic) -> str:
    """Type, shape and digest of the numbers; of what has no numbers to read, type and shape alone."""
    text = f"{type(value).__qualname__} {value.dtype} {tuple(value.shape)} "
    if isinstance(value, Tensor):
        try:
            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        except (RuntimeError, NotImplementedError, TypeError):  # sparse, quantised, on no device
            return text
    elif value.dtype.hasobject:
        return text + repr(value.tolist())
    return text + hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
