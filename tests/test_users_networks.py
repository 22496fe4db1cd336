"""Networks as people have them, and the switches around them: each works and gives the right value, or a sentence."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from users import BALL, NET, X, Y, small

import wdat
from wdat.attacks.autoattack import suite
from wdat.threats.inputs import as_model, copied, unwrapped

CALLS = {
    "attack": lambda m, x, y: wdat.attack(m, x, y, BALL, steps=3).x,
    "fgsm": lambda m, x, y: wdat.fgsm(m, x, y, "1/8").x,
    "pgd": lambda m, x, y: wdat.pgd(m, x, y, "1/8", steps=3).x,
    "w_fgsm": lambda m, x, y: wdat.w_fgsm(m, x, y, BALL).x,
    "w_pgd": lambda m, x, y: wdat.w_pgd(m, x, y, BALL, steps=2).x,
    "w_pgd, kl": lambda m, x, y: wdat.w_pgd(
        m, x, y, BALL, steps=2, loss="kl", start="random", generator=torch.Generator().manual_seed(0)).x,
    "w_pgd_budget": lambda m, x, y: wdat.w_pgd_budget(m, x, y, BALL, steps=3).x,
    "dual_attack": lambda m, x, y: wdat.dual_attack(m, x, y, BALL, steps=2, ladder=(1.0,), ladder_steps=2).radii,
    "upsilon": lambda m, x, y: torch.tensor(wdat.upsilon(m, x, y, BALL).value),
    "minimal_distances": lambda m, x, y: wdat.minimal_distances(m, x, y, "inf", steps=4).distance,
    "certified_radii": lambda m, x, y: wdat.certified_radii(m, x[:4], y[:4], "inf"),
    "evaluate": lambda m, x, y: torch.tensor([
        row["accuracy"] for row in wdat.evaluate(m, wdat.from_tensors(x, y), BALL, steps=2, progress=False)["attacks"]
    ]),
    "finetune": lambda m, x, y: torch.cat([w.flatten() for w in wdat.finetune(
        m, wdat.from_tensors(x, y), wdat.Recipe(wdat.w_trades(BALL, steps=2), epochs=1, batch_size=20), progress=False
    ).model.parameters()]),
}  # fmt: skip
UNTRACEABLE = ("certified_radii",)  # certificates read the graph of layers, which scripts and functions do not show


@pytest.fixture(scope="module")
def right() -> dict[str, Tensor]:
    """What every call gives on the plain network and images."""
    return {name: call(NET, X, Y) for name, call in CALLS.items()}


@contextlib.contextmanager
def float64() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("within", [contextlib.nullcontext, torch.no_grad, torch.inference_mode, float64],
                         ids=lambda value: value.__name__)  # fmt: skip
def test_the_callers_switches_change_nothing(call, within, right):
    with within():
        found = CALLS[call](NET, X, Y)
        if within is float64:
            assert torch.get_default_dtype() == torch.float64
    assert torch.equal(found.to(right[call].dtype), right[call])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "images",
    [
        lambda: X.clone().requires_grad_(),
        lambda: X.clone().requires_grad_() * 1,
        lambda: in_inference_mode(X),
        lambda: X.to(memory_format=torch.channels_last),
        lambda: X.expand(40, 1, 8, 8).transpose(2, 3).contiguous().transpose(2, 3),
        lambda: torch.cat([X, X], 3)[..., :8],
    ],
    ids=["requires grad", "in a graph", "inference", "channels last", "transposed", "a view"],
)
def test_images_of_every_kind(call, images, right):
    x = images()
    torch.testing.assert_close(CALLS[call](NET, x, Y), right[call], rtol=1e-3, atol=1e-4)
    assert torch.equal(x.detach().clone(), X)


class Shifted(nn.Module):
    """Changes its input in place and back again in the first layer's bias: the same function as NET."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small()

    def forward(self, z: Tensor) -> Tensor:
        z.sub_(0.25)
        return self.network(z + 0.25)


@pytest.mark.parametrize("call", [name for name in CALLS if name not in UNTRACEABLE])
@pytest.mark.parametrize("model", [lambda: small(nn.ReLU(inplace=True)), Shifted], ids=["ReLU", "z.sub_()"])
def test_an_input_changed_in_place(call, model, right):
    net, x = model(), X.clone()
    expected = right[call] if isinstance(net, Shifted) else CALLS[call](small(nn.ReLU()), x, Y)  # flat at 0
    torch.testing.assert_close(CALLS[call](net, x, Y), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, X) and not net._forward_pre_hooks and not net._forward_hooks


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["script", "trace", "freeze", "compile", "parallel", "function"])
def test_wrapped_networks(call, kind, right):
    make = {
        "script": torch.jit.script, "trace": lambda m: torch.jit.trace(m, X),
        "freeze": lambda m: torch.jit.freeze(torch.jit.script(m)),
        "compile": lambda m: torch.compile(m, backend="eager"), "parallel": nn.DataParallel,
        "function": lambda m: lambda x: m(x),
    }  # fmt: skip
    net = make[kind](small())
    if (call, kind) in {("finetune", "freeze"), ("finetune", "function")}:
        with pytest.raises(ValueError, match="no weights to train"):
            CALLS[call](net, X, Y)
    elif call in UNTRACEABLE and kind in ("script", "trace", "freeze", "function"):
        with pytest.raises(ValueError, match="certificates need"):
            CALLS[call](net, X, Y)
    else:
        torch.testing.assert_close(CALLS[call](net, X, Y), right[call], rtol=1e-4, atol=1e-5)


class Answers(nn.Module):
    """A network whose answer is put into something else."""

    def __init__(self, put) -> None:
        super().__init__()
        self.network, self.put = small(), put

    def forward(self, x: Tensor) -> object:
        return self.put(self.network(x))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def locked() -> nn.Module:
    with torch.inference_mode():
        return small()


REFUSED = {
    "half": (lambda: small().half(), "float16: call model.float()"),
    "double": (lambda: small().double(), "float64: call model.float()"),
    "meta": (lambda: small().to("meta"), "4 weights are on the meta device"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "2 weights of lazy layers"),
    "inference": (locked, "4 weights were made in torch.inference_mode"),
    "class": (lambda: nn.Identity, "an instance, Identity()"),
    "name": (lambda: "resnet2b", "wdat.load_model"),
    "tuple": (lambda: Answers(lambda z: (z, z)), r"tuple of 2; .* network(x)[0]"),
    "dict": (lambda: Answers(lambda z: {"loss": 0, "logits": z}), "network(x)['logits']"),
    "output": (lambda: Answers(Output), "network(x).logits"),
    "channels": (lambda: small(nn.Conv2d(3, 1, 1)), "takes 3 channels, the images have 1"),
    "size": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(63, 4)), "shape (N, 1, 8, 8)"),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", REFUSED)
def test_a_network_that_can_not_answer(call, kind):
    make, sentence = REFUSED[kind]
    with pytest.raises(ValueError) as found:
        CALLS[call](make(), X, Y)
    for part in sentence.split(" .* "):
        assert part in str(found.value)


BAD_SETS = {
    "uint8": (lambda: ((X * 255).byte(), Y), "divide by 255"),
    "numpy": (lambda: (X.numpy(), Y), "torch.from_numpy"),
    "NHWC": (lambda: (X.permute(0, 2, 3, 1), Y), "permute(0, 3, 1, 2)"),
    "no channel": (lambda: (X[:, 0], Y), "x[:, None]"),
    "empty": (lambda: (X[:0], Y[:0]), "(0, 1, 8, 8)"),
    "half": (lambda: (X.half(), Y), "call .float()"),
    "double": (lambda: (X.double(), Y), "call .float()"),
    "meta": (lambda: (X.to("meta"), Y), "meta device"),
    "int32 labels": (lambda: (X, Y.int()), "y.long()"),
    "uint8 labels": (lambda: (X, Y.byte()), "y.long()"),
    "float labels": (lambda: (X, Y.float()), "y.long()"),
    "one-hot labels": (lambda: (X, nn.functional.one_hot(Y)), "y.argmax(1)"),
    "a list of labels": (lambda: (X, Y.tolist()), "torch.as_tensor(y).long()"),
    "numpy labels": (lambda: (X, Y.numpy()), "torch.as_tensor(y).long()"),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", BAD_SETS)
def test_images_and_labels_that_are_refused(call, kind):
    make, sentence = BAD_SETS[kind]
    if kind == "uint8" and call in ("evaluate", "finetune"):
        assert CALLS[call](NET, *make()).isfinite().all()  # from_tensors keeps 8-bit images as they are
        return
    with pytest.raises(ValueError) as found:
        CALLS[call](NET, *make())
    assert sentence in str(found.value)


def test_copies_and_what_is_inside():
    net = small()
    compiled = torch.compile(nn.DataParallel(net), backend="eager")
    for outside in (nn.DataParallel(net), compiled, as_model(compiled)):
        assert unwrapped(outside) is net
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert torch.equal(copied(normed).weight, normed.weight) and copy.deepcopy(net) is not net


# Training


class Counted(nn.Linear):
    """A layer with a state that is no tensor."""

    def get_extra_state(self) -> dict:
        return {"seen": 3}

    def set_extra_state(self, state: dict) -> None:
        assert state == {"seen": 3}


def with_layer(layer) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), layer()).eval()


WRAPS = {
    "extra state": lambda layer: layer,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old spectral norm": nn.utils.spectral_norm,
    "old weight norm": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm")
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_computed_weights_are_tuned_and_interpolated(wrap, tmp_path):
    net = with_layer(lambda: wrap(Counted(6, 4)))
    net(X)  # hooks have computed their weights
    with torch.no_grad():
        y = (net(X) + torch.arange(4) * 0.01).argmax(1)
    data = wdat.from_tensors(X, y, classes="abcd")
    recipe = wdat.Recipe(wdat.w_trades(BALL, steps=2), epochs=2, batch_size=16, lr=0.2)
    settings = {"checkpoint": tmp_path / "run", "progress": False}
    tuned = wdat.finetune(net, data, recipe, **settings).model
    again = wdat.finetune(net, data, recipe, **settings).model  # from the checkpoint, which is of the last step
    assert torch.equal(tuned(X), again(X)) and not torch.equal(tuned(X), net(X))
    for share, end in ((0.0, net), (1.0, tuned)):
        torch.testing.assert_close(wdat.interpolate(net, tuned, share)(X), end(X))
    half = wdat.interpolate(net, tuned, 0.5)
    weight = (net[-1].weight + tuned[-1].weight) / 2
    torch.testing.assert_close(half[-1].weight, weight)
    assert torch.equal(half[-1].get_extra_state()["seen"] * torch.ones(()), torch.tensor(3.0))
    with pytest.raises(ValueError, match=r"_extra_state .*is no tensor"):
        wdat.save_model(net, tmp_path / "card.yaml", architecture="digits_cnn")


def normed() -> nn.Module:
    """Batch norm on maps of one pixel."""
    return nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4)).eval()


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 39}, {"batch_size": 4, "accumulate": 4}, {"batch_size": 13}, {"batch_size": 1}],
)
def test_batch_norm_and_an_image_alone(settings):
    recipe = wdat.Recipe(wdat.at("1/8", steps=1), epochs=1, **settings)
    with pytest.raises(ValueError, match=r"40 images in batches of .*; set batch_size=.* or layers") as found:
        wdat.finetune(normed(), (X, Y), recipe, progress=False)
    size = int(str(found.value).split("batch_size=")[1].split()[0])
    sizes = {s for b in [size] * (40 // size) + [40 % size] if b for m in [-(-size // recipe.accumulate)]
             for s in [m] * (b // m) + [b % m] if s}  # fmt: skip
    assert 1 not in sizes
    fixed = {**settings, "batch_size": size}
    assert wdat.finetune(normed(), (X, Y), wdat.Recipe(recipe.objective, epochs=1, **fixed), progress=False).history
    held = wdat.Recipe(recipe.objective, epochs=1, layers="last", **settings)
    assert wdat.finetune(normed(), (X, Y), held, progress=False).history


# AutoAttack


@pytest.mark.parametrize(
    ("classes", "attacks"),
    [
        (2, "apgd-ce, fab-t, square"), (3, "apgd-ce, apgd-dlr, fab-t, square"), (4, "standard"), (10, "standard"),
    ],
)  # fmt: skip
def test_the_attacks_that_few_classes_allow(classes, attacks):
    version, names = suite("standard", None, classes)
    assert attacks == (version if version == "standard" else ", ".join(names))
    for version, given in (("rand", None), ("custom", ["apgd-t"])):
        least = 3 if version == "rand" else 4
        if classes >= least:
            assert suite(version, given, classes)[0] == version
            continue
        with pytest.raises(ValueError, match=f"least {least} classes"):
            suite(version, given, classes)


@pytest.mark.parametrize("classes", [2, 3])
def test_two_and_three_classes_are_evaluated_by_autoattack(classes):
    net = nn.Sequential(*NET[:-1], nn.Linear(64, classes)).eval()
    with torch.no_grad():
        net[-1].weight.copy_(NET[-1].weight[:classes])
        net[-1].bias.copy_(NET[-1].bias[:classes])
        y = net(X).argmax(1)
    data, threat = (X, y), wdat.Threat("1/4", "inf")
    quick = {"steps": 2, "losses": ("ce",), "optimal": False, "progress": False}
    found = wdat.evaluate(net, data, threat, autoattacked=2, **quick)["autoattack"][0]
    assert found["version"] == ", ".join(suite("standard", None, classes)[1]) and found["accuracy"] == 0
    counted = []
    net.register_forward_hook(lambda *_: counted.append(1))
    with pytest.raises(ValueError, match=r"autoattack\.autoattack"):
        wdat.evaluate(net, data, threat, autoattacked=6, autoattack_version="custom", **quick)
    assert not counted
