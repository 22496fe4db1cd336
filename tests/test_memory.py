"""Memory: what attacks, Υ and evaluations hold at once stays flat as images grow."""

import math

import pytest
import torch
from cases import case
from nets import images, labels
from torch import nn

from benchmarks import benchmark
from wdat.attacks.pgd import attack
from wdat.studies.evaluation import evaluate
from wdat.threats.ball import Threat
from wdat.threats.sensitivity import dual_norms
from wdat.zoo.data import from_tensors

INF = math.inf


def peaks(run, sizes, batch):
    """Most bytes alive at once, made by `run`, over sets of these sizes."""
    found = []
    for n in sizes:
        model, x, y = case(n=n)
        with benchmark.Live() as live:
            run(model, x, y, batch)
        found.append(live.peak)
    return found


def test_live_bytes_are_those_of_tensors_alive():
    outside = torch.zeros(1000)
    with benchmark.Live() as live:
        a = torch.zeros(256) + outside[:256]
        assert live.now == 4 * 256
        b = a.view(16, 16).t()  # shares its memory
        del a
        assert live.now == 4 * 256
        b = b.sum()
        assert live.now == 4
        torch.randn(512)
    assert live.now == 4 and live.peak == 4 * 513 and float(b) == 0


def test_upsilon_streams():
    """Past the first batch an image adds its norm and what the estimate does with it, not its pixels or activations."""
    small, middle, large = peaks(lambda m, x, y, b: dual_norms(m, x, y, Threat(1), "ce", b), (64, 256, 1024), 32)
    assert large - middle <= 16 * (1024 - 256) and small > 16 * 64  # 16 bytes of at least 72 an image has


@pytest.mark.parametrize(("p", "r"), [(2, "inf"), (2, "2"), (INF, "inf")])
def test_w_pgd_keeps_a_few_copies_of_the_images_and_one_batch_of_activations(p, r):
    """What grows with the set: the iterate, the best one, directions of one step, never the graph."""
    image = 4 * images(1).numel()
    run = lambda m, x, y, b: attack(m, x, y, Threat(0.1, p, r), steps=2, batch_size=b)  # noqa: E731
    (small, large), (whole,) = peaks(run, (128, 1024), 16), peaks(run, (1024,), 1024)
    slope = (large - small) / (1024 - 128)
    # the iterate, the best one, a byte for each sign (r = 2: a direction), and a few numbers: logits, values, norms
    assert slope <= (3 if r == "2" else 2.25) * image + 45 * 4
    assert large < 0.6 * whole  # in one batch the activations of all images are alive at once


def test_an_evaluation_inside_fixed_radii_holds_numbers_and_no_images():
    """Exact curves and pointwise attacks go part by part; nearest points are for those who ask for them."""
    found = []
    for n in (512, 1024):
        x = torch.rand(n, 3, 16, 16)
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
        data = from_tensors(x, labels(model, x, 5), classes=list("abcd"))
        with benchmark.Live() as live:
            evaluate(model, data, [Threat(0.1, INF)], losses=["ce"], steps=2, curve=5, progress=False)
        found.append(live.peak)
    assert found[1] - found[0] <= 0.1 * 512 * 4 * x[0].numel()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to measure")
def test_the_gpu_holds_one_batch_however_many_images_there_are():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 900, 10)).cuda()
    tops = []
    for n in (256, 1024):
        torch.cuda.reset_peak_memory_stats()
        attack(model, torch.rand(n, 3, 32, 32), torch.arange(n) % 10, Threat(0.1), steps=2, batch_size=128)
        tops.append(torch.cuda.max_memory_allocated())
    assert tops[1] - tops[0] <= 1024 * 1000
