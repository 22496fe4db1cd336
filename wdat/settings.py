"""One typed reading of settings, wherever they are written: recipes, cards, profiles, `-P`, the shell, Python.

The kinds are the annotations of dataclasses and functions:

    bool            true or false, as such or as text
    int             a whole number: 16, "16", 64.0; neither 1.5 nor true
    float           a finite number: 0.03, "1e-3" (which YAML reads as text), "8/255"
    Order, Written  a number that may be infinite; the same, checked and kept as it was written
    Norm            a pixel norm, which may be text such as "l2"
    str, list[X], tuple[X, ...], Sequence[X], dict, X | Y; a class: an instance, or a mapping of a dataclass's fields

What does not fit is a ValueError with section, setting, value and what is expected. Written here because the usual
libraries coerce otherwise (true is 1, "8/255" is no number), so that each kind would be an extension of theirs.
"""

import difflib
import functools
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from fractions import Fraction
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

Order = Annotated[float, "or inf"]
Written = Annotated[float, "as written"]
Norm = Order | str  # "l2"
EXPECTED = {
    bool: "true or false", int: "a whole number, such as 16", float: 'a number, such as 0.03, 1e-3 or "8/255"',
    Order: 'a number or "inf"', Written: 'a number, such as 0.03 or "8/255"', str: "text (in quotes, if it is digits)",
    dict: "a mapping", list: "a list", tuple: "a list", NoneType: "nothing",
}  # fmt: skip


class _Unfit(Exception):
    """The value is not of the kind."""


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 3, 160, 160
_repr.maxdict = _repr.maxlist = _repr.maxtuple = 12


def shown(value: Any) -> str:
    """The value as a sentence can hold it: some of it, however much it is (YAML's aliases can make it endless)."""
    return " ".join(_repr.repr(value).split())


def parse_number(value: float | str) -> float:
    """A float from 0.03, "0.03", "8/255" or "inf". ValueError names what could not be read."""
    text = str(value).strip().lower()
    try:
        found = float(Fraction(text)) if "/" in text else float("inf" if text in ("linf", "l_inf", "oo") else text)
    except (ValueError, ZeroDivisionError, OverflowError):
        found = math.nan
    if math.isnan(found):
        raise ValueError(f'{value!r} is not a number; write for example 0.03, "8/255" or "inf"')
    return found


def read(kind: Any, value: Any, where: str) -> Any:
    """The value as this kind; `where` names section and setting in the ValueError of one that does not fit."""
    try:
        return _read(kind, value, where)
    except _Unfit:
        raise ValueError(f"{where} is {shown(value)}; expected {_expected(kind)}") from None


def arguments(maker: Callable, settings: Any, section: str) -> dict[str, Any]:
    """The settings, each read as the kind that `maker`, a dataclass or function, declares for it."""
    kinds = _kinds(maker)
    if not isinstance(settings, Mapping):
        raise ValueError(f"{section} is {shown(settings)}; expected a mapping of {', '.join(kinds)}")
    check_names(settings, kinds, section)
    return {name: read(kinds[name], value, f"{section}: {name}") for name, value in settings.items()}


def check_names(names: Iterable[Any], known: Iterable[str], section: str) -> None:
    """ValueError for the first unknown name, with the nearest known ones."""
    known = list(known)
    for name in (name for name in names if name not in known):
        word = str(name).lower()
        near = [k for k in known if len(word) > 2 and word in k] or difflib.get_close_matches(word, known, 2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown setting {name!r} of {section}; {hint}known: {', '.join(known)}")


def typed(instance: Any, section: str) -> None:
    """Read every field of a dataclass in place; for its `__post_init__`."""
    for name, kind in _kinds(type(instance)).items():
        object.__setattr__(instance, name, read(kind, getattr(instance, name), f"{section}: {name}"))


def reads(section: str, part: type | None = None, *own: str) -> Callable[[Callable], Callable]:
    """Decorator of a function whose `**settings` are fields of the dataclass `part`, but for those in `own`."""

    def decorate(function: Callable) -> Callable:
        signature, kinds = inspect.signature(function), _kinds(function)
        kinds = kinds | {name: kind for name, kind in _kinds(part).items() if name not in own} if part else kinds

        @functools.wraps(function)
        def checked(*given: Any, **named: Any) -> Any:
            check_names(named, kinds, section)
            bound = signature.bind(*given, **named).arguments
            bound |= bound.pop("settings", {})
            return function(**{name: read(kinds[name], value, f"{section}: {name}") for name, value in bound.items()})

        return checked

    return decorate


@functools.cache
def _kinds(maker: Callable) -> dict[str, Any]:
    hints = get_type_hints(maker, include_extras=True)
    if is_dataclass(maker):
        return {field.name: hints[field.name] for field in fields(maker) if field.init}
    named = inspect.signature(maker).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or PyTorch
        value = value.item()
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        for arm in inner:
            try:
                return _read(arm, value, where)
            except _Unfit:
                continue
        raise _Unfit
    if origin in (list, tuple, Sequence):
        make = type(value) if origin is Sequence else origin
        return make(_read(inner[0], part, where) for part in _fit(value, isinstance(value, list | tuple)))
    if kind is bool:
        value = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
        return _fit(value, isinstance(value, bool))
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (int, float, Order, Written):
        number = _number(value)
        if kind is int:
            return int(_fit(number, number.is_integer()))
        _fit(number, math.isfinite(number) or kind is not float)
        return value if kind is Written else number
    if is_dataclass(kind) and isinstance(value, Mapping):
        try:
            return kind(**arguments(kind, value, where))
        except TypeError as error:  # a field that has no default is missing
            raise ValueError(f"{where} is {shown(value)}: {error}") from None
    return _fit(value, isinstance(value, Mapping if kind is dict else origin or kind))


def _number(value: Any) -> float:
    _fit(value, isinstance(value, int | float | str) and not isinstance(value, bool))
    try:
        return parse_number(value)
    except ValueError:
        raise _Unfit from None


def _fit(value: Any, fits: bool) -> Any:
    if not fits:
        raise _Unfit
    return value


def _expected(kind: Any) -> str:
    inner = [arm for arm in get_args(kind) if arm is not Ellipsis]
    if kind in EXPECTED:
        return EXPECTED[kind]
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_expected(arm) for arm in inner)
    if get_origin(kind) in (list, tuple, Sequence):
        return f"a list, each {_expected(inner[0])}"
    name = getattr(kind, "__name__", kind)
    if name == "Tensor":
        return "a Tensor (images: torch.from_numpy(x), labels: torch.as_tensor(y).long())"
    return f"a mapping of {', '.join(_kinds(kind))}" if is_dataclass(kind) else f"a {name}"
