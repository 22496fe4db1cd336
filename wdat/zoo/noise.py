"""A network that draws Gaussian noise before it answers, and the arithmetic in which the draws are made.

*Arithmetic.* A floating-point sum of image and noise betrays the image: its lowest bits depend on it, and a network can
be built that reads them (Voráček and Hein, arXiv 2207.07209). Here image and noise are both rounded to multiples of one
power of two, so that their sum, below 2^24 such steps, is exact: what the network is given is a function of the image
plus rounded noise, and nothing else of the image remains. The rounding of the image moves a pixel by at most half a
step; certificates pay for it (`Randomised.slack`). What is left to trust is that torch's normal numbers are normal.
"""

import math

import torch
from torch import Tensor, nn

from wdat.settings import read
from wdat.threats.checks import check_function, device_of, frozen
from wdat.threats.inputs import as_model
from wdat.threats.seeds import derive_seed

LARGEST = 10.0  # standard deviations are those of pixels in [0, 1]
REACH = 7.0  # torch's normal numbers in float32 end below this


def step_of(sigma: float) -> float:
    """The power of two that images and noise are rounded to: images plus noise stay below 2^24 of it."""
    return 2.0 ** (math.ceil(math.log2(1 + REACH * sigma)) - 24)


def snap(x: Tensor, step: float) -> Tensor:
    """x rounded to multiples of step, a power of two. The gradient passes through unchanged."""
    rounded = (x.detach() / step).round_().mul_(step)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def stream(device: torch.device, seed: int, *place: int | str) -> torch.Generator:
    """A generator on the device whose draws belong to a seed and a place: the same give the same draws there."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *place))


def noise(like: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """N(0, sigma^2) noise for every pixel, on the grid of `step_of`."""
    step = step_of(sigma)
    drawn = torch.randn(like.shape, generator=generator, device=like.device)
    return drawn.mul_(sigma / step).round_().mul_(step)


def check_sigma(sigma: float) -> float:
    """The standard deviation as a number. ValueError unless it is in (0, 10]."""
    if not (isinstance(sigma, int | float) and not isinstance(sigma, bool) and 0 < sigma <= LARGEST):
        raise ValueError(
            f"sigma={sigma} must be in (0, {LARGEST:g}], a standard deviation of pixels in [0, 1]; 0.25 is a common one"
        )
    return float(sigma)


class Randomised(nn.Module):
    """network(x + noise), noise N(0, sigma^2) in every pixel: one draw an image and forward pass.

    On (x, y) it is right with probability g(x) = P(network(x + noise) = y), and Phi^-1(g) is 1/sigma-Lipschitz in the
    l2 norm of the image (Salman et al., arXiv 1906.04584), whatever the network. Noisy pixels are not clipped to
    [0, 1]: the Lipschitz constant is that of unclipped pixels.

    Args:
        network: logits of images (N, C, H, W); normalisation inside. It must itself be deterministic.
        sigma: standard deviation, in (0, 10].
        seed: of the draws. Forward pass number k of a seed draws the same noise on the same kind of device;
            `reseed` starts again at k = 0.

    ValueError for another sigma and for a network that is randomised already.

    >>> noisy = wdat.Randomised(model, 0.25)
    >>> noisy.sigma, noisy(x).shape
    (0.25, torch.Size([60, 10]))
    """

    def __init__(self, network: nn.Module, sigma: float, seed: int = 0) -> None:
        super().__init__()
        network = as_model(network)
        if any(isinstance(module, Randomised) for module in network.modules()):
            raise ValueError("the network is randomised already; pass its .network with the sigma you want")
        self.sigma, self.network = check_sigma(sigma), network
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Begin the draws of this seed."""
        self.seed, self.calls = read(int, seed, "Randomised: seed"), 0

    @property
    def step(self) -> float:
        """Images and noise are rounded to multiples of it."""
        return step_of(self.sigma)

    def forward(self, x: Tensor) -> Tensor:
        generator = stream(x.device, self.seed, self.calls)
        self.calls += 1
        return self.network(snap(x, self.step) + noise(x, self.sigma, generator))

    def answers(self, x: Tensor, n: int) -> Tensor:
        """How often each class came in n draws: (N, C, H, W) -> int64 (N, classes), rows sum to n."""
        if n < 1:
            raise ValueError(f"n={n} draws; at least 1 is needed")
        check_base(self.network, x[:8])
        counts = None
        with frozen(self), torch.no_grad():
            for _ in range(n):
                logits = self(x.to(device_of(self)))
                counts = torch.zeros_like(logits, dtype=torch.int64) if counts is None else counts
                counts.scatter_add_(1, logits.argmax(1, keepdim=True), torch.ones_like(counts[:, :1]))
        return counts

    def vote(self, x: Tensor, n: int, confidence: float = 0.999) -> Tensor:
        """The most frequent class of n draws, int64 (N,); -1 where it does not lead the second with this confidence.

        The abstention is the two-sided binomial test of Cohen, Rosenfeld and Kolter, arXiv 1902.02918: with
        probability `confidence` an answer is the class most frequent among all draws.
        """
        from scipy.stats import binom

        check_confidence(confidence)
        counts = self.answers(x, n)
        top, order = counts.topk(2, 1)
        chance = 2 * binom.sf(top[:, 0].cpu().numpy() - 1, top.sum(1).cpu().numpy(), 0.5)
        sure = torch.from_numpy(chance <= 1 - confidence).to(counts.device)
        return torch.where(sure, order[:, 0], -1)


class Averaged(nn.Module):
    """log of the mean softmax over fixed draws: images (N, C, H, W) -> (N, classes), m passes an image.

    drawn: noise (m, C, H, W), the same for every image, or (N, m, C, H, W); step: that images are rounded to (0: not),
    see `snap`. Deterministic, and differentiable in the
    images, so that every attack runs on it unchanged (SmoothAdv, Salman et al., arXiv 1906.04584). Cross-entropy on it
    is -log of the mean probability of the right class.
    """

    def __init__(self, network: nn.Module, drawn: Tensor, step: float = 0.0) -> None:
        super().__init__()
        self.network, self.drawn, self.step = network, drawn, step

    def forward(self, x: Tensor) -> Tensor:
        noisy = (snap(x, self.step) if self.step else x)[:, None] + self.drawn
        logits = self.network(noisy.flatten(0, 1)).unflatten(0, noisy.shape[:2]).float()
        return logits.log_softmax(2).logsumexp(1) - math.log(noisy.shape[1])


def check_confidence(confidence: float) -> None:
    """ValueError unless it is in (0, 1)."""
    if not 0 < read(float, confidence, "confidence") < 1:
        raise ValueError(f"confidence={confidence} must be in (0, 1), such as 0.999")


def check_base(network: nn.Module, x: Tensor) -> int:
    """Number of classes; ValueError if batch norm is in training mode, or logits are no function of the image alone:
    noise inside the network would not be counted as what it is."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in network.modules()):
        raise ValueError(
            "batch norm is in training mode, so an image's answer depends on its batch; call model.eval() first"
        )
    return check_function(network, x)
