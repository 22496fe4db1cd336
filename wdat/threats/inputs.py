"""Networks, images and labels as people have them: taken, or refused in a sentence before any work.

`taking` stands at every public call. Its readers look at arguments without a pass through the network; what only a
pass can show (an input changed in place, a wrong number of channels) is seen at the first one that is made anyway.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from wdat.threats.checks import frozen
from wdat.threats.images import Pixels


class Called(nn.Module):
    """A function of the images as a module, or a scripted one, which takes no hooks; weights and modes are its own."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def as_model(model: object) -> nn.Module:
    """The network as an nn.Module: itself, or a function or a scripted module in `Called`.

    ValueError for what answers nothing yet: a class, lazy layers without weights, weights on the meta device or made
    in inference mode.
    """
    if isinstance(model, type) or not callable(model):
        seen = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        remedy = f"pass an instance, {model.__name__}()" if isinstance(model, type) else "wdat.load_model reads names"
        raise ValueError(f"the model is {seen}; expected an nn.Module or a function of the images: {remedy}")
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        model = Called(model)
    weights = [*model.parameters(), *model.buffers()]
    if lazy := sum(nn.parameter.is_lazy(w) for w in weights):
        raise ValueError(f"{lazy} weights of lazy layers have no shape yet; call the model on an image, then train it")
    if empty := sum(w.is_meta for w in weights):
        raise ValueError(f"{empty} weights are on the meta device, without numbers; build the model there with "
                         'model.to_empty(device="cpu") and load its state dictionary')  # fmt: skip
    if locked := sum(w.is_inference() for w in weights):
        raise ValueError(f"{locked} weights were made in torch.inference_mode, which takes their gradients away for "
                         "good; pass copy.deepcopy(model), made outside of it")  # fmt: skip
    return model


def as_tensor(x: Any) -> Any:
    """A tensor outside of any graph and of inference mode, the same memory where that can be; else x as it is."""
    if not isinstance(x, Tensor):
        return x
    return x.clone() if x.is_inference() else x.detach()


def optional(reader: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same reader where the argument may be left out: None stays None."""
    return lambda given: None if given is None else reader(given)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network whose weights these are: inside torch.compile, DataParallel and `Called`."""
    for name in ("_orig_mod", "function", "module"):
        inner = getattr(model, name, None)
        kind = nn.parallel.DataParallel | nn.parallel.DistributedDataParallel
        if isinstance(inner, nn.Module) and (name == "_orig_mod" or isinstance(model, Called | kind)):
            return unwrapped(inner)
    return model


@torch.no_grad()  # or the copied weights of a scripted module would be results, not leaves
def copied(model: nn.Module) -> nn.Module:
    """A deep copy of the network, `unwrapped`. Weights that a hook computes at every forward are computed anew."""
    model = unwrapped(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:  # of torch.nn.utils.weight_norm: can not be copied
                setattr(module, name, value.detach())
    hooks = model._forward_pre_hooks
    asides = {key: hook for key, hook in hooks.items() if isinstance(hook, _Aside)}
    try:
        for key in asides:  # of the call that is running: it stays with the original
            del hooks[key]
        made = copy.deepcopy(model)
    finally:
        hooks.update(asides)
    for own, original in zip(made.parameters(), model.parameters(), strict=True):
        own.requires_grad_(original.requires_grad)
    return made


@torch.enable_grad()  # without, a weight made of two (weight norm) would be no parameter of the copy
def plain_weights(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights are what weight norm, spectral norm or any parametrisation computed."""
    model = copied(model).eval()
    for module in model.modules():
        if parametrize.is_parametrized(module):
            kind = type(module)  # shared with the original, whose properties must not go: a class of its own
            own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, own)
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
    return model


class _Aside:
    """A forward pre-hook that gives the network a copy of its input: at its first pass, and on if it changed that."""

    def __init__(self) -> None:
        self.copy: Tensor | None = None
        self.version, self.needed = 0, True

    def __call__(self, module: nn.Module, arguments: tuple) -> tuple | None:
        if self.copy is not None:
            self.needed, self.copy = self.copy._version != self.version, None
        if not self.needed:
            return None
        self.copy = arguments[0].clone()
        self.version = self.copy._version
        return self.copy, *arguments[1:]


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Inside, a network that changes its input in place (a first ReLU(inplace=True), z.sub_) changes a copy of it.

    Others are given one copy, at the first pass, by which the two are told apart. Compiled code is left alone: it reads
    .grad of its input, which a copy has not.
    """
    if hasattr(model, "_orig_mod") or any(isinstance(hook, _Aside) for hook in model._forward_pre_hooks.values()):
        yield
        return
    handle = model.register_forward_pre_hook(_Aside())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def standing() -> Iterator[None]:
    """Inside, autograd is on and new tensors are float32, whatever the caller has set; afterwards as it was."""
    default = torch.get_default_dtype()
    with torch.inference_mode(False), torch.enable_grad():
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(default)


@contextmanager
def explained(model: nn.Module, images: object) -> Iterator[None]:
    """Turn what torch says when the network does not take these images into a ValueError with a remedy.

    Nothing is tried before something failed: then one image goes through, and an error of another origin stays.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) or not (said := why(model, images)):
            raise
        raise ValueError(said) from error


def why(model: nn.Module, images: object) -> str | None:
    """Why the network fails on the first image (of a tensor, `Pixels` or a data set); None if it does not."""
    if not isinstance(images, Tensor | Pixels) and not hasattr(images, "batch"):
        return None
    image = images[:1] if isinstance(images, Tensor | Pixels) else images.batch(torch.arange(1))[0]
    weights = [*model.parameters(), *model.buffers()]
    reason = ""
    for with_gradients in (False, True):
        try:
            given = image.to(weights[0].device if weights else "cpu").clone().requires_grad_(with_gradients)
            with frozen(model), torch.set_grad_enabled(with_gradients):
                model(given)
        except Exception as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            break
    if not reason:
        return None
    if with_gradients:
        return (f"the model answers, but gives no gradient in the images ({reason}); pass it without torch.compile, "
                "and without changes in place or in inference mode")  # fmt: skip
    kinds = {w.dtype for w in weights if w.is_floating_point()}
    places = sorted({str(w.device) for w in weights})
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = None if first is None else first.in_channels
    if kinds and torch.float32 not in kinds:
        remedy = f"its weights are {min(map(str, kinds))}: call model.float()"
    elif len(places) > 1:
        remedy = f"its weights lie on {' and '.join(places)}: move all of it with model.to"
    elif channels is not None and channels != image.shape[1]:
        nhwc = channels == image.shape[3]
        remedy = f"its first convolution takes {channels} channels, the images have {image.shape[1]}"
        remedy += ": call x.permute(0, 3, 1, 2)" if nhwc else ": pass images of the kind it was trained on"
    else:
        remedy = "pass images of the number of channels and the size it was trained on"
    return (
        f"the model fails on images of shape (N, {', '.join(map(str, image.shape[1:]))}), float32 ({reason}); {remedy}"
    )


def taking(**readers: Callable[[Any], Any]) -> Callable[[Callable], Callable]:
    """Decorator of a public call: arguments go through their readers, torch's switches are as they must be.

    Arguments left at their defaults are read too, so that a reader sees None where nothing was passed.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*arguments: Any, **settings: Any) -> Any:
            bound = signature.bind(*arguments, **settings)
            bound.apply_defaults()
            with standing():
                for name, reader in readers.items():
                    bound.arguments[name] = reader(bound.arguments[name])
                model = bound.arguments["model"]
                images = next(bound.arguments[name] for name in readers if name in ("x", "data", "train"))
                with aside(model), explained(model, images):
                    return function(*bound.args, **bound.kwargs)

        return call

    return decorate
