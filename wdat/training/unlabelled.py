"""Images without labels: labelled by a network's own predictions, and joined to labelled ones.

With true labels for few images and many without, adversarial training takes the predictions of a network trained on the
few for the labels of the rest (Carmon et al., arXiv 1905.13736; Zhang et al., arXiv 2206.06257). The objective
`unlabelled` needs none at all: it compares predictions with predictions.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from wdat.threats.checks import check_logits
from wdat.threats.images import Images, logits_of
from wdat.threats.inputs import as_model
from wdat.zoo.data import Data, from_tensors


def pseudo_labelled(model: nn.Module, x: Images | Tensor | Data, batch_size: int = 256) -> Data:
    """Images (N, C, H, W), or those of a set whose labels are not read, labelled by what the network predicts.

    ValueError if it predicts one class for all.
    """
    model = as_model(model)
    images = x if isinstance(x, Data) else from_tensors(x, torch.arange(len(x)) % 2, "unlabelled")
    logits = logits_of(model, images.stored()[0], batch_size)
    check_logits(logits, len(images))
    y = logits.argmax(1).cpu()
    if len(y.unique()) < 2:
        raise ValueError(
            f"the network predicts class {int(y[0])} for all {len(y)} images; labels like these teach nothing"
        )
    named = images.classes if isinstance(x, Data) else tuple(str(k) for k in range(logits.shape[1]))
    return replace(images, y=y, classes=named)


def joined(one: Data, other: Data) -> Data:
    """Both sets as one, with the names of the first. ValueError for images or classes that do not fit together."""
    if one.pixels.shape[1:] != other.pixels.shape[1:] or len(one.classes) != len(other.classes):
        raise ValueError(
            f"images {tuple(one.pixels.shape[1:])} of {len(one.classes)} classes and {tuple(other.pixels.shape[1:])} "
            f"of {len(other.classes)} are of two kinds; bring them to one size, channels and classes"
        )
    y = torch.cat([one.y, other.y])
    if one.levels == other.levels and one.pixels.dtype == other.pixels.dtype:
        return replace(one, pixels=torch.cat([one.pixels, other.pixels]), y=y)
    return replace(one, pixels=torch.cat([one.x, other.x]), y=y, levels=1)
