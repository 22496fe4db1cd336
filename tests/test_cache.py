"""What is kept of one function is never taken for another's; what has not changed is not computed again."""

import copy
import ctypes
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import GELU, Conv2d, Flatten, Linear, ReLU, Sequential
from torch.nn.utils import parametrizations, weight_norm

from wdat import digest
from wdat.studies import cache, measures
from wdat.studies.cache import Cache, prune
from wdat.studies.evaluation import evaluate
from wdat.threats.ball import Threat
from wdat.zoo import identity
from wdat.zoo.data import Data, from_tensors

SETTINGS = dict(
    losses=("ce",), steps=2, search={"steps": 2}, batch_size=16, curve=3, budget_attack=True, progress=False
)
THREATS = (Threat("1/16"), Threat("1/16", float("inf")))
SHIFT = 0.0


class Behind(nn.Module):
    """A network behind a normalisation by everything that weights do not show."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.mu, self.calls, self.last = net, 0.0, 0, None
        self.register_buffer("mean", torch.zeros(1), persistent=False)
        self.listed, self.hidden, self.shift = [0.0, {"mu": torch.zeros(1)}], ctypes.c_float(0), lambda z: z
        self.others = [nn.BatchNorm2d(1, affine=False)]  # not registered

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.last = self.calls + 1, x.detach()
        z = self.shift(x) - self.mu - self.mean - self.listed[0] - self.listed[1]["mu"] - self.hidden.value - SHIFT
        return self.net(self.others[0].eval()(z))


def start() -> Behind:
    torch.manual_seed(0)
    return Behind(Sequential(Conv2d(1, 4, 3, 2, 1), ReLU(), Flatten(), Linear(64, 4)).eval())


@pytest.fixture
def data() -> Data:
    model = start()
    x = torch.rand(40, 1, 8, 8)
    return from_tensors(x, model(x).argmax(1), classes="abcd")


def by_closure(constant: float):
    def forward(x: Tensor) -> Tensor:
        return x - constant

    return forward


def in_place(value: Tensor) -> None:
    with torch.no_grad():
        value.add_(0.5)


CHANGES = {
    "plain attribute": lambda m: setattr(m, "mu", 0.5),
    "buffer that is not saved": lambda m: in_place(m.mean),
    "in a list": lambda m: m.listed.__setitem__(0, 0.5),
    "tensor in a dict in a list": lambda m: in_place(m.listed[1]["mu"]),
    "in an object that says nothing": lambda m: setattr(m.hidden, "value", 0.5),
    "activation": lambda m: m.net.__setitem__(1, GELU()),
    "hyper-parameter of a layer": lambda m: setattr(m.others[0], "eps", 0.5),
    "buffer of a module in a list": lambda m: in_place(m.others[0].running_mean),
    "weight": lambda m: in_place(m.net[0].bias),
    "function": lambda m: setattr(m, "shift", lambda z: z - 0.5),
    "constant in a closure": lambda m: setattr(m, "shift", by_closure(0.5)),
    "forward": lambda m: setattr(m, "forward", types.MethodType(lambda self, x: self.net(x - 0.5), m)),
    "hook": lambda m: m.register_forward_pre_hook(lambda _, x: (x[0] - 0.5,)),
}  # fmt: skip


def counted(model: nn.Module, seen: list[int]) -> nn.Module:
    model.register_forward_hook(lambda _, x, __: seen.append(len(x[0])))
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_another_function_shares_nothing(change, data, tmp_path):
    model = start()
    first = evaluate(model, data, THREATS, state=tmp_path, **SETTINGS)
    CHANGES[change](model)
    found = evaluate(model, data, THREATS, state=tmp_path, **SETTINGS)
    assert found == evaluate(model, data, THREATS, **SETTINGS) and found != first
    assert evaluate(start(), data, THREATS, state=tmp_path, **SETTINGS) == first  # both are kept, side by side
    assert evaluate(model, data, THREATS, state=tmp_path, **SETTINGS) == found


def test_two_shifts_of_one_network_have_their_own_accuracy(data, tmp_path):
    accuracy = []
    for shift in (0.5, 0.0):
        model = start()
        model.mu = shift
        found = evaluate(model, data, THREATS, state=tmp_path, **SETTINGS)
        accuracy.append((found["clean"]["accuracy"], float((model(data.x).argmax(1) == data.y).double().mean())))
    assert accuracy[0] == (pytest.approx(0.85), pytest.approx(0.85)) and accuracy[1] == (1, 1)


def test_a_constant_of_the_module_and_the_code_of_a_method_belong_to_the_function(data, monkeypatch):
    before, _ = identity.identify(start(), data)
    assert identity.identify(start(), data)[0] == before
    monkeypatch.setitem(globals(), "SHIFT", 0.5)
    shifted, _ = identity.identify(start(), data)
    real = Behind.forward
    monkeypatch.setattr(Behind, "forward", lambda self, x: real(self, 1 * x))
    assert len({before, shifted, identity.identify(start(), data)[0]}) == 3


def test_the_same_function_is_not_computed_again(data, tmp_path):
    """By the same object after many passes, by a copy, and by one made anew: some passes of 8 images, to know it."""
    first = evaluate(model := start(), data, THREATS, state=tmp_path, **SETTINGS)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for again in (model, copy.deepcopy(model).train(), start()):
        seen = []
        assert evaluate(counted(again, seen), data, THREATS, state=tmp_path, **SETTINGS) == first
        assert max(seen) == identity.FEW and len(seen) <= 6
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def kept_in_a_process(folder: Path) -> int:
    """Passes that one clean pass takes there."""
    model, seen = start(), []
    model.names = {"a", "b", "c", Behind}
    x = torch.rand(8, 1, 8, 8)
    data = from_tensors(x, model(x).argmax(1), classes="abcd")
    Cache(folder, counted(model, seen)).get(measures.clean_pass, data, losses=("ce",))
    return len(seen)


def test_another_process_finds_what_was_kept(tmp_path):
    """Nothing in a key is an address or an order of sets."""
    code = f"import pathlib, test_cache; print(test_cache.kept_in_a_process(pathlib.Path({str(tmp_path)!r})))"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "5"}
    assert kept_in_a_process(tmp_path) == 3
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "2" and len(list(tmp_path.iterdir())) == 1


OTHERS = {
    "steps": {"steps": 3},
    "losses": {"losses": ("redlr", "ce")},
    "search": {"search": {"steps": 3}},
    "curve": {"curve": 5},  # drawn anew from what is kept
    "batch size": {"batch_size": 8},
    "certified": {"certified": 4},
    "dual": {"dual": True},
}


@pytest.mark.parametrize("name", [*OTHERS, "threat", "images", "labels", "classes", "fewer"])
@pytest.mark.filterwarnings("ignore:0 of 40 images are classified correctly")  # with the labels shifted
def test_other_settings_and_data_share_nothing_that_depends_on_them(name, data, tmp_path):
    def run(images: Data, threats: tuple, **settings):
        return evaluate(start().net, images, threats, **{**SETTINGS, **settings})

    run(data, THREATS, state=tmp_path)
    x, y = data.x, data.y
    images = {
        "images": lambda: from_tensors(x.flip(3), y, classes="abcd"),
        "labels": lambda: from_tensors(x, (y + 1) % 4, classes="abcd"),
        "classes": lambda: from_tensors(x, y, classes="efgh"),
        "fewer": lambda: data.take(20),
    }.get(name, lambda: data)()
    threats = (Threat("1/8"), Threat("1/8", 3)) if name == "threat" else THREATS
    settings = OTHERS.get(name, {})
    assert run(images, threats, state=tmp_path, **settings) == run(images, threats, **settings)


@pytest.mark.parametrize("name", cache.SEARCH)
def test_every_setting_of_the_search_is_in_the_key(name, data, tmp_path):
    calls = []

    def look(**settings):
        calls.append(1)
        kept = Cache(tmp_path, start())
        before = len(list(tmp_path.glob("*")))
        kept.get(cache.nearest, data.take(4), r=2.0, **settings)
        return len(list(tmp_path.glob("*"))) - before

    value = cache.SEARCH[name]
    other = not value if isinstance(value, bool) else 9.0 if value == float("inf") else value + 1
    assert look() == 1 and look(**{name: other}) == 1
    assert look() == 0 and look(**{name: other}) == 0


def test_numbers_of_another_version_of_the_library_are_not_used(data, tmp_path, monkeypatch):
    seen = []
    kept = Cache(tmp_path, counted(start(), seen))
    for expected in (1, 1, 2):
        if expected == 2:
            monkeypatch.setattr(cache, "version", lambda module: f"new {module}")
        kept.get(measures.clean_pass, data, losses=("ce",), batch_size=40)
        assert seen.count(40) == expected


def test_numbers_outlive_a_rename_and_a_move_but_no_change_of_what_computes(data, tmp_path, monkeypatch):
    """Of the very package, in a copy of its files."""
    package, seen = tmp_path / "wdat", []
    shutil.copytree(Path(cache.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(digest, "__file__", str(package / "digest.py"))
    monkeypatch.setattr(cache, "version", digest.version.__wrapped__)
    kept = Cache(tmp_path / "state", counted(start(), seen))

    def computed() -> bool:
        before = seen.count(len(data))
        kept.get(measures.clean_pass, data, losses=("ce",), batch_size=len(data))
        return seen.count(len(data)) > before

    def rewrite(file: str, old: str, new: str) -> None:
        text = (package / file).read_text()
        assert old in text
        (package / file).write_text(text.replace(old, new))

    assert computed() and not computed()
    for file in package.rglob("*.py"):  # a function and a file, wherever they are named
        text = file.read_text().replace("check_outputs", "check_classes").replace("wdat.threats.losses", "wdat.losses")
        file.write_text(text)
    (package / "threats/losses.py").rename(package / "losses.py")
    rewrite("zoo/data.py", 'names = ", ".join(data.classes[:4])', 'shown = ", ".join(data.classes[:4])')
    rewrite("zoo/data.py", "({names}), the network", "({shown}), the network")
    rewrite("studies/measures.py", "per_class", "by_class")
    assert not computed()
    rewrite("losses.py", "import torch", "# no number is altered\nimport torch")
    rewrite("attacks/pgd.py", "fgsm = partial(pgd, steps=1", "fgsm = partial(pgd, steps=2")
    assert not computed()
    rewrite("studies/measures.py", "margin(logits.detach(), y) > 0", "margin(logits.detach(), y) >= 0")
    assert computed()


def test_all_that_an_evaluation_calls_is_reached_by_its_digest(data):
    """Seen by the interpreter's own profiler: whatever is called by a method, a registry or a decorator."""
    called, package = set(), str(Path(cache.__file__).parents[1])

    def note(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            called.add(f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname.split('.')[0]}")

    sys.setprofile(note)
    try:
        evaluate(start().net, data, THREATS, certified=4, dual=True, **SETTINGS)
    finally:
        sys.setprofile(None)
    _, reached = digest.reached("from wdat.studies.evaluation import evaluate\nevaluate")
    made = {name for name in called if not name.endswith(("<module>", "<lambda>", "<genexpr>", "<listcomp>"))}
    assert len(made) > 100 and made <= set(reached)


def test_images_changed_in_place_are_others(tmp_path):
    x, model = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), start()
    data, settings = from_tensors(x, torch.arange(8) % 4, classes="abcd"), {"losses": ("ce",)}
    kept = Cache(tmp_path, model)
    first = kept.get(measures.clean_pass, data, **settings)["logits"]
    x.mul_(0.5)
    again = kept.get(measures.clean_pass, data, **settings)["logits"]
    assert torch.equal(again, measures.clean_pass(model, data, **settings)["logits"]) and not again.equal(first)


KINDS = {
    "plain": lambda m: m,
    "weight norm": lambda m: parametrizations.weight_norm(m[3]) and m,
    "spectral norm": lambda m: parametrizations.spectral_norm(m[3]) and m,
    "old weight norm": lambda m: weight_norm(m[3]) and m,
    "traced graph": torch.fx.symbolic_trace,
    "scripted": torch.jit.script,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "bfloat16": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_network_of_any_kind_is_known_again(kind):
    def known(shift: float = 0) -> str:
        model = start().net
        with torch.no_grad():
            model[3].weight[0, 0] += shift
        return identity.value_digest(KINDS[kind](model))

    assert known() == known() != known(0.01)


def test_rounding_is_not_another_function(data):
    _, logits = identity.identify(start(), data)
    assert identity.same(logits, logits * (1 + 1e-6)) and identity.same(logits, logits.flip(0).flip(0))
    assert not identity.same(logits, logits * 1.001) and not identity.same(logits, logits[:4])


def test_a_single_image_is_a_part_that_any_set_shares(data, tmp_path):
    """Its results are found again in a larger set, in another order."""
    settings = {"loss": "ce", "steps": 2, "batch_size": 1, "threat": THREATS[1]}
    few = Cache(tmp_path, start()).each(measures.attacked, data.take(5), 1, **settings)
    seen = []
    more = Cache(tmp_path, counted(start(), seen)).each(measures.attacked, data.take(10), 1, **settings)
    assert torch.equal(more["values"][:5], few["values"]) and len(list(tmp_path.iterdir())) == 10
    whole = Cache(None, start()).each(measures.attacked, data.take(10), 1, **settings)
    assert torch.equal(more["values"], whole["values"]) and more["passes"] == whole["passes"]
    # a pass to know each image (and one more of the first), and the attack on the five new ones
    assert len(seen) == 11 + 5 * len_of_attack(data, settings)


def len_of_attack(data: Data, settings: dict) -> int:
    seen = []
    measures.attacked(counted(start(), seen), data.take(1), **settings)
    return len(seen)


def test_a_damaged_file_is_named_and_can_be_deleted(data, tmp_path):
    first = evaluate(start(), data, THREATS, state=tmp_path, **SETTINGS)
    for damage in (b"", b"junk", None):
        file = sorted(tmp_path.iterdir())[0]
        file.write_bytes(file.read_bytes()[:-50] if damage is None else damage)
        with pytest.raises(ValueError, match=rf"{file.name} can not be read; delete it to start anew"):
            evaluate(start(), data, THREATS, state=tmp_path, **SETTINGS)
        file.unlink()
        assert evaluate(start(), data, THREATS, state=tmp_path, **SETTINGS) == first


def test_what_was_used_longest_ago_is_pruned_first(data, tmp_path):
    kept = Cache(tmp_path, start())
    for number, size in enumerate((4, 5, 6)):
        kept.get(measures.clean_pass, data.take(size), losses=("ce",))
        for file in tmp_path.iterdir():
            os.utime(file, (file.stat().st_atime - 10 * (3 - number), file.stat().st_mtime))
    written = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    kept.get(measures.clean_pass, data.take(4), losses=("ce",))  # used again: now the last
    assert written == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}  # it was not written again
    sizes = sorted(file.stat().st_size for file in tmp_path.iterdir())
    assert prune(tmp_path) == sum(sizes)
    assert prune(tmp_path, sum(sizes) - 1) < sum(sizes) and len(list(tmp_path.iterdir())) == 2
    seen = []
    again = Cache(tmp_path, counted(start(), seen))
    for size, expected in ((4, 0), (6, 0), (5, 1)):
        again.get(measures.clean_pass, data.take(size), losses=("ce",), batch_size=128)
        assert len(list(tmp_path.iterdir())) == 2 + expected
