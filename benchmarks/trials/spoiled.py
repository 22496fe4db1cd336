"""Bad values by kind of argument.

A kind is a function of a random generator and the good value; what it returns must be refused, but for the kinds of
`ODD`, of which some turn out good.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import wdat

Kind = Callable[[random.Random, Any], Any]
NAN, INF = math.nan, math.inf


def one(*values: Any) -> Kind:
    """One of these values; of functions, what they make of the good value."""
    return lambda rng, good: v(rng, good) if callable(v := rng.choice(values)) and not isinstance(v, type) else v


def word(rng: random.Random, _: Any = None) -> str:
    """Text that names nothing."""
    letters = "abcxyz0189 _-/.:%é\n\0{}[]'\"\\"
    return "?" + "".join(rng.choice(letters) for _ in range(rng.randint(0, 12)))


def mangled(rng: random.Random, good: str) -> str:
    """The text with a few pieces cut, doubled or replaced."""
    text = good
    for _ in range(rng.randint(1, 3)):
        i, n = rng.randrange(len(text) + 1), rng.randint(0, 6)
        text = (
            text[:i]
            + rng.choice(["", word(rng), text[i : i + n] * 2, "nan", "-1", ".inf", "null", "NaN"])
            + text[i + n :]
        )
    return text


THINGS = (
    None,
    "",
    word,
    [],
    [1, 2],
    {},
    (),
    object(),
    b"1",
    1j,
    int,
    lambda rng, _: torch.rand(rng.randint(2, 4)),
    NAN,
)
below = lambda rng, _: -rng.choice([1, 2, 1e-3, 1e30, 5, rng.random() + 1e-6])  # noqa: E731
between = lambda rng, _: rng.randint(0, 4) + 0.25 + rng.random() / 2  # noqa: E731
unlike = one(*THINGS, True, INF, -INF)
whole = one(unlike, 0, lambda rng, _: -rng.randint(1, 10**9), between, "1.5", "nan")  # at least 1
count = one(unlike, lambda rng, _: -rng.randint(1, 10**9), between)  # at least 0
seed = one(*THINGS[1:], between, INF)
positive = one(unlike, below, 0, "nan", "-1")
weight = one(unlike, below, "nan")  # at least 0
share = one(unlike, below, lambda rng, _: 1 + rng.random() + 1e-6, 0, "nan")
flag = one(None, word, [1], {}, 2, 0.5, NAN, "yes", torch.rand(2))
choice = one(word, None, 3, NAN, [], {}, b"ce", True, object(), -1.5)
path = one(3, 1.5, [], {}, object(), b"a", NAN, int)
order = one(*THINGS, below, lambda rng, _: rng.random() * 0.99, "nan", "l1")  # p in (1, inf]
norm = one(*THINGS, below, 0, 1, 3, 2.5, "l1", "l0")
radius = one(*THINGS, below, INF, "inf", "1/0", "-1/255", "nan", lambda rng, _: 2 + 1e3 * rng.random())
numbers = one(
    None, 3, word, object(), [], ["x"], [NAN], [None], lambda rng, _: [below(rng, 0)], [[1.0]], {}, [INF, "a"]
)


def ball(rng: random.Random, good: Any) -> Any:
    """No threat, or one of a radius beyond all images."""
    beyond = [wdat.Threat(2 + 1e3 * rng.random(), p, r) for p, r in ((2, INF), (INF, INF), (1.5, INF))]
    return one(
        3, 0.1, NAN, None, word, "W_0.5 linf 8/255", "W_2 l1 1/16", "", object(), {"delta": 0.1}, [], int, *beyond
    )(rng, good)


def images(rng: random.Random, good: Tensor, alone: bool = False) -> Any:
    """Images of another shape, type, range or place, with a pixel that is no number, or no images at all.

    alone: no such as only a network refuses.
    """
    n, c, h, w = good.shape
    spot = tuple(rng.randrange(k) for k in good.shape)

    def put(value: float) -> Tensor:
        x = good.clone()
        x[spot] = value
        return x

    shape = [rng.randint(0, 5) for _ in range(rng.choice([0, 1, 2, 3, 5]))]
    makers = [
        lambda: put(rng.choice([NAN, INF, -INF, 1 + 10 ** -rng.randint(0, 5), -(10 ** -rng.randint(0, 5)), 255.0])),
        lambda: torch.rand(shape), lambda: torch.rand(0, c, h, w), lambda: good * 255,
            lambda: good - 0.5 - good.amin(),
        lambda: good.to(rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool,
                                    torch.complex64])),
        lambda: good.to("meta"), lambda: good.to_sparse(), lambda: good.double().numpy(), lambda: good.tolist(),
        lambda: good.permute(0, 2, 3, 1), lambda: good[: rng.randrange(n)],
        lambda: torch.quantize_per_tensor(good, 0.1, 0, torch.quint8), lambda: torch.nested.nested_tensor(list(good)),
        lambda: rng.choice([None, 3, word(rng), object(), [], {}, int]),
    ]  # fmt: skip
    other = [lambda: torch.rand(n, c + rng.randint(1, 3), h, w), lambda: torch.rand(n, c, h + rng.randint(1, 9), w)]
    return rng.choice(makers if alone else makers + other)()


def labels(rng: random.Random, good: Tensor) -> Any:
    """Labels of another type, shape, number or range."""
    y = good.clone()
    y[rng.randrange(len(y))] = rng.choice([-1, -rng.randint(1, 2**40), 2**30, 2**62])
    makers = [
        y, good.float(), good.int(), good.to(torch.uint8), good.bool(), good[None], good[:-1], good[:0],
            good.double() * NAN,
        torch.cat([good, good]), torch.eye(5)[good % 5], good.tolist(), good.numpy(), good.to("meta"),
            good.to_sparse(),
        None, 3, word(rng), object(), {}, [],
    ]  # fmt: skip
    return rng.choice(makers)


class Odd(nn.Module):
    """A network around another that spoils what goes in or comes out."""

    def __init__(self, network: nn.Module, change: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.network, x)


def _raise(error: Exception) -> Any:
    raise error


CHANGES: tuple[Callable[[nn.Module, Tensor], Any], ...] = (
    lambda m, x: m(x).softmax(1), lambda m, x: m(x) * NAN, lambda m, x: m(x) / 0, lambda m, x: m(x)[:, :1],
    lambda m, x: m(x)[:-1], lambda m, x: m(x).argmax(1), lambda m, x: (m(x),), lambda m, x: {"logits": m(x)},
    lambda m, x: None, lambda m, x: m(x)[..., None], lambda m, x: m(x) + torch.randn(len(x), 5),
    lambda m, x: m(x) + x.mean() * 50, lambda m, x: _raise(KeyError("weights")), lambda m,
        x: _raise(RuntimeError("no")),
    lambda m, x: m(x).long(), lambda m, x: m(x).to(torch.complex64), lambda m, x: x, lambda m, x: m(x).numpy(),
    lambda m, x: m(x.flip(0)), lambda m, x: m(x)[:, :0],
)  # fmt: skip


def network(rng: random.Random, good: nn.Module) -> Any:
    """No network, or one that does not answer as a classifier of such images does."""
    if rng.random() < 0.6:
        return Odd(good, rng.choice(CHANGES))
    return _other_network(rng, good)


def no_network(rng: random.Random, good: nn.Module) -> Any:
    """What is no network, for those who do not ask it anything."""
    return rng.choice([None, 3, word(rng), [], {}, nn.Linear, object(), NAN, b"a"])


def _other_network(rng: random.Random, good: nn.Module) -> Any:
    def poisoned() -> nn.Module:
        model = tiny()
        weights = list(model.parameters())
        with torch.no_grad():
            rng.choice(weights).view(-1)[0] = rng.choice([NAN, INF])
        return model

    return rng.choice([
        lambda: no_network(rng, good), poisoned, lambda: tiny().double(), lambda: tiny().half(), lambda: tiny(c=1),
        lambda: nn.LazyLinear(5), lambda: tiny().to("meta"), lambda: nn.Sequential(nn.Flatten(), nn.Linear(7, 5)),
        lambda: nn.Identity(), lambda: nn.Sequential(),
        lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), tiny()),
    ])()  # fmt: skip


def tiny(c: int = 3) -> nn.Module:
    """A seeded network, images (N, c, 6, 6) -> 5 logits."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(c, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).eval()


def data(rng: random.Random, good: "wdat.Data") -> Any:
    """No data, or pairs of which one part is bad."""
    x, y = good.x, good.y
    makers = [
        lambda: (images(rng, x), y), lambda: (x, y + 9),
        lambda: (x, y.float()), lambda: (x, -y), lambda: (x, y[:-1]), lambda: [x], lambda: (x, y, y),
        lambda: rng.choice([None, 3, word(rng), "digits", [], {}, int, object(), x, NAN]),
        lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:0], y[:0])),
        lambda: torch.utils.data.TensorDataset(x), lambda: [(a, int(b)) for a, b in zip(x, y, strict=True)],
        lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x * NAN, y)),
    ]  # fmt: skip
    return rng.choice(makers)()


def mask(rng: random.Random, good: dict) -> Any:
    """No mask, or one of other weights."""
    name = rng.choice(list(good))
    return rng.choice([3, word(rng), [], {}, {name: good[name]}, {**good, name: good[name][:1]}, {**good,
        "other": good[name]},
                       {**good, name: None}, {**good, name: [1]}, {**good, name: good[name] * NAN},
                           object()])  # fmt: skip


def distances(rng: random.Random, good: Tensor) -> Any:
    """Distances that are none."""
    d = good.clone()
    d[rng.randrange(len(d))] = rng.choice([NAN, -1.0, -INF, -1e-9])
    return rng.choice([d, d, d, good[:0], good[None], good[0], None, 3, word(rng), object(), good.to("meta"),
                       good.to(torch.complex64), {}, good.to_sparse()])  # fmt: skip


def settings(kinds: dict[str, Kind]) -> Kind:
    """A mapping of settings of which one is bad or unknown, or no mapping."""

    def spoil(rng: random.Random, good: dict) -> Any:
        if rng.random() < 0.15:
            return rng.choice([3, word(rng), [1], object(), NAN])
        name = rng.choice([*kinds, "colour"])
        return {**(good or {}), name: kinds.get(name, word)(rng, (good or {}).get(name))}

    return spoil
