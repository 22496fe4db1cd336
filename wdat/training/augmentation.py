"""Random crops and mirroring of a batch, the same for any number of workers (`wdat.threats.joint`)."""

from functools import partial

import torch
from torch import Tensor, nn

from wdat.threats import joint
from wdat.threats.ball import per_image


def shift_and_flip(x: Tensor, shift: int, flip: bool) -> Tensor:
    """Random crop after zero padding by `shift` pixels, and mirroring, image by image: (N, C, H, W) -> the same."""
    n, _, h, w = x.shape
    if shift:
        padded = nn.functional.pad(x, (shift,) * 4)
        draw = partial(torch.randint, 0, 2 * shift + 1, device=x.device)
        top, left = joint.drawn(lambda shape: draw((2, *shape)).movedim(0, 1), (n, 1)).unbind(1)
        rows = (top + torch.arange(h, device=x.device))[:, None, :, None]
        columns = (left + torch.arange(w, device=x.device))[:, None, None, :]
        channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        x = padded[torch.arange(n, device=x.device)[:, None, None, None], channels, rows, columns]
    if flip:
        x = torch.where(
            per_image(joint.drawn(partial(torch.rand, device=x.device), (n,)) < 0.5, x).bool(), x.flip(3), x
        )
    return x
