"""Carry an edit of a small copy over to the full-size original (layer 0).

A model edits a small copy s of an original S, and gives e. A transfer turns s and e into two small
maps, for every pixel a 3 x 3 matrix M and an offset c, both in [0, 1] units. The result is
    S + M S + c
with M and c enlarged bicubically to the size of S: the detail is that of the original. All but
`upscale` start from the difference d = e - s, so that without a difference M and c are exactly 0,
and the result is the original, bit for bit.

Sizes: h x w of the small copy, H x W of the original.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ipx2p.errors import InputError
from ipx2p.names import check_names

RADIUS = 4  # of the windows in which the affine model is fitted, in pixels of the small copy
EPS = 0.01  # ridge of that fit, as a part of the small copy's variance
LEAST_RIDGE = 1e-8  # in squared [0, 1] units, for a picture of one colour
DARK = 0.02  # added to both sides of a ratio, for black pixels
VISIBLE = 0.02  # a misfit of the affine model that begins to be seen, in [0, 1] units
STRIP_PIXELS = 2**19  # of the original, computed at once


class Change(NamedTuple):
    """What happens to each pixel of the original: matrix (3, 3, h, w), offset (3, h, w)."""

    matrix: Tensor
    offset: Tensor


Transfer = Callable[[Tensor, Tensor], Change]

TRANSFERS: dict[str, Transfer] = {}


def transfer(find: Transfer) -> Transfer:
    """Add a transfer to `TRANSFERS`, under the name of its function."""
    TRANSFERS[find.__name__] = find
    return find


@transfer
def auto(source: Tensor, edited: Tensor) -> Change:
    """`affine`, and where it does not explain the small edit, a residual of what it misses.

    Missed is the low-passed m = d - (M s + c). With the mean of m^2 in the window, the share that
    is added is m^2 / (m^2 + VISIBLE^2): half of it where the misfit begins to be seen, next to
    nothing for the small errors of an autoencoder. Content that no matrix makes from the source
    is so carried by the residual, while the matrix still removes the detail that it replaces.
    """
    change = affine(source, edited)
    missed = low_pass(edited - source - _applied(change, source))
    misfit = box_mean(missed.square().mean(0, keepdim=True))
    share = misfit / (misfit + VISIBLE**2)  # (1, h, w)
    return Change(change.matrix, change.offset + share * missed)


@transfer
def affine(source: Tensor, edited: Tensor) -> Change:
    """A local affine model of the difference, fitted to the colours of the small copy.

    The guided filter with a colour guide (He, Sun and Tang 2013, TPAMI 35), with d for its
    input. Its ridge pulls to 0, which would leave the small differences of colour of a dark picture
    as they are while its light grows, and so nearly grey; here it pulls to one gain for all colours
    (the same fit with a single number), whose ridge pulls to "no change". It grows with the
    contrast of the picture, so a dark one is fitted like a bright one. Any edit that is an affine
    function of each pixel is reproduced as EPS goes to 0.
    """
    difference = edited - source
    source_mean, difference_mean = box_mean(source), box_mean(difference)

    def covariance(other: Tensor, other_mean: Tensor) -> Tensor:  # -> (h, w, 3, 3)
        means = box_mean((other[:, None] * source).flatten(0, 1)).unflatten(0, (3, 3))
        return (means - other_mean[:, None] * source_mean).permute(2, 3, 0, 1)

    one = torch.eye(3, dtype=source.dtype)
    ridge = EPS * source.var((1, 2), correction=0).mean() + LEAST_RIDGE
    guide, both = covariance(source, source_mean), covariance(difference, difference_mean)
    gain = _trace(both) / (_trace(guide) + 3 * ridge)  # one number for all colours, minus 1
    solved = torch.linalg.solve(guide + ridge * one, both.mT + ridge * gain * one)
    matrix = solved.permute(3, 2, 0, 1)  # M of d = M s + c: rows are channels of d
    offset = difference_mean - (matrix * source_mean).sum(1)
    return Change(box_mean(matrix.flatten(0, 1)).unflatten(0, (3, 3)), box_mean(offset))


@transfer
def residual(source: Tensor, edited: Tensor) -> Change:
    """The low-passed difference is added."""
    return Change(source.new_zeros(3, *source.shape), low_pass(edited - source))


@transfer
def ratio(source: Tensor, edited: Tensor) -> Change:
    """Each channel of the original is multiplied by the ratio of the low-passed small pictures."""
    gain = low_pass(edited - source) / (low_pass(source) + DARK)  # minus 1
    return Change(torch.diag_embed(gain.movedim(0, -1)).movedim((-2, -1), (0, 1)), DARK * gain)


@transfer
def upscale(source: Tensor, edited: Tensor) -> Change:
    """The small edit is enlarged, and nothing of the original is used: a baseline."""
    minus_one = -torch.eye(3, dtype=source.dtype)[..., None, None]
    return Change(minus_one.expand(3, *source.shape), edited)


def carry_over(
    original: Tensor, source01: Tensor, edited01: Tensor, name: str, strip_rows: int | None = None
) -> Tensor:
    """The original with the edit of its small copy. Works in strips of rows, to save memory.

    Args:
        original: (H, W, 3), uint8 or uint16; it stays as it is.
        source01: the small copy as the model saw it, (3, h, w) in [0, 1]. edited01: likewise what
            became of it.
        name: of a transfer.
        strip_rows: rows at once; None: as many as `STRIP_PIXELS` allow.
    Returns: (H, W, 3), in the dtype of `original`: clamped, rounded to nearest.
    Raises: InputError for an unknown name, or small pictures that do not match.
    """
    check_names(transfer=name)
    if source01.shape != edited01.shape or source01.ndim != 3 or len(source01) != 3:
        shapes = f"{tuple(source01.shape)} and {tuple(edited01.shape)}"
        raise InputError(f"source01 and edited01 have shapes {shapes}, expected (3, h, w) of both")
    white = torch.iinfo(original.dtype).max
    change = TRANSFERS[name](source01.double(), edited01.double())
    maps = torch.cat([change.matrix.flatten(0, 1), change.offset * white]).float()  # (12, h, w)
    height, width = original.shape[:2]
    down = enlarging(maps.shape[-2], height)
    across = enlarging(maps.shape[-1], width).mT.contiguous()
    rows = strip_rows or max(1, STRIP_PIXELS // width)
    result = torch.empty_like(original)
    for top in range(0, height, rows):
        weights = down[top : top + rows]
        used = weights.any(0).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1  # few rows of the maps matter to a strip
        strip_maps = weights[:, first:last] @ (maps[:, first:last] @ across)  # (12, rows, W)
        levels = original[top : top + rows].movedim(-1, 0).float()  # (3, rows, W)
        strip = _applied(Change(strip_maps[:9].unflatten(0, (3, 3)), strip_maps[9:]), levels)
        strip.add_(levels).round_().clamp_(0, white)
        result[top : top + rows] = strip.movedim(0, -1).to(original.dtype)
    return result


def carried(source01: Tensor, edited01: Tensor, name: str) -> Tensor:
    """The small copy itself with the edit, as a transfer carries it: (3, h, w), not clamped."""
    source = source01.double()
    change = TRANSFERS[name](source, edited01.double())
    return (source + _applied(change, source)).float()


def enlarging(size: int, full_size: int) -> Tensor:
    """The matrix that resamples `size` pixels to `full_size` by cubic convolution (a = -0.5).

    (full_size, size), rows sum to 1. Keys 1981; the last pixel continues beyond the border.
    """
    place = (torch.arange(full_size).double() + 0.5) * size / full_size - 0.5
    taps = place.floor().long()[:, None] + torch.arange(-1, 3)  # (full_size, 4)
    x = (place[:, None] - taps).abs()
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x <= 1, near, far)
    matrix = torch.zeros(full_size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, taps.clamp(0, size - 1), weights).float()


def box_mean(maps: Tensor) -> Tensor:
    """(C, h, w) -> the mean over each pixel's window, of what is inside the picture."""
    side = 2 * RADIUS + 1
    return F.avg_pool2d(maps[None], side, 1, RADIUS, count_include_pad=False)[0]


def low_pass(maps: Tensor, levels: int = 1) -> Tensor:
    """(C, h, w) smoothed by 1-2-1 along both sides, of pixels 1, 2, 4, ... apart, level by level.

    The first level removes what alternates from pixel to pixel: there an autoencoder errs most, and
    enlarged it would be a pattern. All levels are nearly a Gaussian of variance (4^levels - 1) / 6.
    Border pixels continue outside.
    """
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=maps.dtype)
    for apart in (2**level for level in range(levels)):
        padded = F.pad(maps[:, None], [apart] * 4, mode="replicate")
        rows = F.conv2d(padded, kernel.view(1, 1, 3, 1), dilation=apart)
        maps = F.conv2d(rows, kernel.view(1, 1, 1, 3), dilation=apart)[:, 0]
    return maps


def _trace(matrices: Tensor) -> Tensor:
    """(h, w, 3, 3) -> (h, w, 1, 1)."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _applied(change: Change, pixels: Tensor) -> Tensor:
    """M p + c at each pixel of (3, h, w)."""
    result = change.offset.clone()
    for channel in range(3):
        result.addcmul_(change.matrix[:, channel], pixels[channel])
    return result
