"""Distances between batches of pictures in closed form (layer 0, torch only).

All take `pixels01`, float in [0, 1], (N, 3, H, W), and give one value per sample, (N,) float64,
computed in float64 on the device of the input. Anything else is refused: a metric fed with another
range gives numbers that look right. Higher is better, but for L1, L2 and `invented`.
Those that take `counted`, weights of positions, (N, 1, H, W), average over these; see `outside`.
`METRICS` lists those of validation: a new one is one more entry.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ipx2p.errors import InputError

RANGE_TOLERANCE = 1e-6  # how far a value may leave [0, 1]: rounding, not another range
SSIM_WINDOW = 11  # Wang et al. 2004, sec. III.C: a Gaussian of 11 x 11, sigma 1.5
SSIM_SIGMA = 1.5
SSIM_C1 = 0.01**2  # (K L)^2 with a data range L of 1
SSIM_C2 = 0.03**2
LUMA = (65_481, 128_553, 24_966)  # BT.601 in 16..235, in 1/1000: MATLAB's rgb2ycbcr
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
HAARPSI_C = 30  # Reisenhofer et al. 2018, sec. 3, for values in 0..255
HAARPSI_ALPHA = 4.2
INVENTED_WINDOW = 2 * SSIM_WINDOW - 1  # two Gaussian windows, one after the other
CHANGED = 5 / 255  # local difference of a pair, above which the picture may change
LEAST_OUTSIDE = 0.1  # of the positions: what is measured on fewer says little of a picture

Distance = Callable[..., Tensor]  # of two batches, and weights of positions


def l1(pixels01: Tensor, reference01: Tensor) -> Tensor:
    """Mean absolute difference over channels and positions, in [0, 1]."""
    a, b = _checked(pixels01, reference01)
    return (a - b).abs().mean(dim=(1, 2, 3))


def l2(pixels01: Tensor, reference01: Tensor) -> Tensor:
    """Mean squared difference over channels and positions, in [0, 1]; no root is taken."""
    a, b = _checked(pixels01, reference01)
    return (a - b).square().mean(dim=(1, 2, 3))


def psnr(pixels01: Tensor, reference01: Tensor, counted: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / mean squared difference); inf if identical."""
    a, b = _checked(pixels01, reference01)
    return -10 * mean_of((a - b).square(), counted).log10()


def psnr_y(pixels01: Tensor, reference01: Tensor) -> Tensor:
    """PSNR of luma, as rain benchmarks measure: in whole levels of 16..235, with a peak of 255."""
    a, b = map(_luma, _checked(pixels01, reference01))
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def ssim(pixels01: Tensor, reference01: Tensor, counted: Tensor | None = None) -> Tensor:
    """Structural similarity of Wang et al. 2004 (IEEE TIP 13(4), eq. 13), at most 1.

    Computed for each channel where the whole 11 x 11 window lies inside the picture, with the
    window's own (population) covariance, then averaged over positions and channels. Pictures are
    not converted to grey and not reduced in size before. A window counts as its centre does.
    Raises: InputError also if a side is shorter than the window, which is never made smaller.
    """
    a, b = _checked(pixels01, reference01, least=SSIM_WINDOW)
    return _ssim(a, b, _window_mean, None if counted is None else _inner(counted))


def ssim_y(pixels01: Tensor, reference01: Tensor) -> Tensor:
    """`ssim` of luma, as rain benchmarks measure: whole levels of 16..235, a data range of 255."""
    a, b = map(_luma, _checked(pixels01, reference01, least=SSIM_WINDOW))
    return _ssim(a, b, _window_mean)


def ssim_3d(pixels01: Tensor, reference01: Tensor) -> Tensor:
    """What MATLAB's `ssim` gives for an H x W x 3 array, as used for GoPro and SIDD.

    MATLAB takes the three channels for the slices of a volume: the Gaussian window has 11 values,
    sigma 1.5, along height, width and channel. The volume is continued by its nearest value, so
    that every position counts.
    """
    a, b = _checked(pixels01, reference01)
    return _ssim(a, b, _volume_mean)


def haarpsi(pixels01: Tensor, reference01: Tensor, counted: Tensor | None = None) -> Tensor:
    """Haar wavelet-based perceptual similarity (Reisenhofer et al. 2018, arXiv:1607.06140), 0 to 1.

    Of YIQ colours in 0..255, reduced to half their size by means of 2 x 2 (sec. 3 and 4.3). Where
    the filters reach over the border the picture is continued with zeros, as in the authors' code.
    A position of the reduced picture counts as the mean of its pixels.
    """
    both = _checked(pixels01, reference01)
    mix = both[0].new_tensor(YIQ)
    a, b = (255 * torch.einsum("oc,nchw->nohw", mix, x).flatten(0, 1) for x in both)
    mean = a.new_full((2, 2), 0.25)
    a, b = (_same(x, mean)[..., ::2, ::2].unflatten(0, (-1, 3)) for x in (a, b))
    similarities, weights = [], []
    for turn in (lambda x: x, torch.t):  # horizontal, vertical
        near, far, coarse = (
            tuple(_same(x[:, 0], turn(_haar(scale, x))).abs() for x in (a, b))
            for scale in (1, 2, 3)
        )
        similarities.append((_alike(*near) + _alike(*far)) / 2)
        weights.append(torch.maximum(*coarse))
    chroma = (tuple(_same(x[:, item], mean).abs() for x in (a, b)) for item in (1, 2))
    similarities.append(sum(_alike(*pair) for pair in chroma) / 2)
    weights.append((weights[0] + weights[1]) / 2)
    local, weight = (torch.stack(x, dim=1) for x in (similarities, weights))  # (N, 3, H/2, W/2)
    if counted is not None:
        weight = weight * F.avg_pool2d(counted.to(weight), 2, ceil_mode=True)
    total = weight.sum(dim=(1, 2, 3))
    score = ((HAARPSI_ALPHA * local).sigmoid() * weight).sum(dim=(1, 2, 3)) / total
    similarity = (score.logit() / HAARPSI_ALPHA).square()
    return torch.where(total == 0, 1.0, similarity)  # both pictures are black


def invented(pixels01: Tensor, source01: Tensor, target01: Tensor) -> Tensor:
    """Fine detail that neither source nor target has, in levels of 0..255: 0, none, to 127.

        E(x) = G * mean over channels of (x - G * x)^2       the energy of detail around a position
        invented = 255 sqrt(mean of max(0, E(result) - M(max(E(source), E(target)))))

    G is SSIM's Gaussian window, where it lies inside the picture, and M the maximum over a square
    as large: noise of another draw and edges that moved by a few pixels are not invented. White
    noise of s levels on a flat picture counts about s.
    Raises: InputError also if a side is shorter than 21 pixels, two windows.
    """
    result, source = _checked(pixels01, source01, least=INVENTED_WINDOW)
    _, target = _checked(pixels01, target01)
    known = torch.maximum(_detail(source), _detail(target))
    known = F.max_pool2d(known, SSIM_WINDOW, stride=1, padding=SSIM_WINDOW // 2)
    excess = (_detail(result) - known).clamp(min=0)
    return 255 * excess.mean(dim=(1, 2, 3)).sqrt()


def change_mask(source01: Tensor, target01: Tensor) -> Tensor:
    """Where a pair says that the picture may change: 1 there, else 0, (N, 1, H, W), float64.

        mask = 1 where M(G * max over channels of |target - source|) > 5 levels of 0..255

    G is SSIM's Gaussian window, the picture continued by its nearest values, and M the maximum over
    a square as large: the window of a position outside the mask holds nothing that changed, and an
    edit may move its edges by a few pixels. Differences are made positive before they are averaged,
    since noise and rain that were removed are changes, though their mean is none; the largest
    channel decides, since a change of hue is one. Rather too much is left out than too little:
    noise of 5 levels is a change everywhere, and so is what JPEG does to texture.
    """
    source, target = _checked(source01, target01)
    half = SSIM_WINDOW // 2
    difference = (target - source).abs().amax(dim=1, keepdim=True)
    local = _window_mean(F.pad(difference, (half, half, half, half), mode="replicate"))
    return (F.max_pool2d(local, SSIM_WINDOW, stride=1, padding=half) > CHANGED).double()


def share_outside(mask: Tensor) -> Tensor:
    """The share of positions outside a mask, of those whose SSIM window lies in the picture, (N,).

    nan if there are no such positions.
    """
    return _inner(1 - mask.double()).mean(dim=(1, 2, 3))


def outside(measure: Distance, pixels01: Tensor, reference01: Tensor, mask: Tensor) -> Tensor:
    """A measure that takes `counted`, over the positions where the mask is 0, (N,).

    Where it is 1, the reference is put in place of the picture: windows that reach there see no
    difference, and no edge that a blackened region would add to both.
    Args: mask: 1 where the picture may change, (N, 1, H, W).
    Raises: InputError also for a mask that leaves nothing to measure.
    """
    if not (share_outside(mask) > 0).all():
        raise InputError("metrics: the mask covers a whole picture: nothing is left to compare")
    counted = 1 - mask
    return measure(torch.where(mask > 0, reference01, pixels01), reference01, counted)


def mean_of(local: Tensor, counted: Tensor | None) -> Tensor:
    """The mean over channels and positions, weighted by `counted`, (N, C, H, W) -> (N,)."""
    if counted is None:
        return local.mean(dim=(1, 2, 3))
    counted = counted.to(local).expand_as(local)
    return (local * counted).sum(dim=(1, 2, 3)) / counted.sum(dim=(1, 2, 3))


class Metric(NamedTuple):
    """A metric of two batches, and how to print and compare its values."""

    measure: Callable[[Tensor, Tensor], Tensor]
    unit: str
    digits: int
    higher_is_better: bool = True

    def is_worse(self, one: float, other: float) -> bool:
        """Whether the first value is worse than the second."""
        return one < other if self.higher_is_better else one > other


METRICS = {"psnr": Metric(psnr, "dB", 2), "ssim": Metric(ssim, "", 4)}


def _ssim(
    a: Tensor, b: Tensor, mean: Callable[[Tensor], Tensor], counted: Tensor | None = None
) -> Tensor:
    """Eq. 13 with local means by `mean`, averaged over all that these give."""
    mean_a, mean_b = mean(a), mean(b)
    var_a = mean(a * a) - mean_a**2
    var_b = mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (var_a + var_b + SSIM_C2)
    return mean_of(luminance * structure, counted)


def _gaussian() -> list[float]:
    """SSIM's window along one dimension."""
    offsets = (place - SSIM_WINDOW // 2 for place in range(SSIM_WINDOW))
    weights = [math.exp(-0.5 * (offset / SSIM_SIGMA) ** 2) for offset in offsets]
    return [weight / sum(weights) for weight in weights]


def _window_mean(x: Tensor) -> Tensor:
    """Gaussian mean of every full window: (N, C, H, W) -> (N, C, H - 10, W - 10)."""
    for dim in (-2, -1):
        size = x.shape[dim] - SSIM_WINDOW + 1
        mean = torch.zeros_like(x.narrow(dim, 0, size))
        for place, weight in enumerate(_gaussian()):  # on a CPU much faster than a convolution
            mean.add_(x.narrow(dim, place, size), alpha=weight)
        x = mean
    return x


def _inner(x: Tensor) -> Tensor:
    """The positions whose whole window lies inside the picture."""
    half = SSIM_WINDOW // 2
    return x[..., half:-half, half:-half]


def _volume_mean(x: Tensor) -> Tensor:
    """Gaussian mean over channel, height and width, continued by the nearest value; same shape."""
    weights, half = torch.tensor(_gaussian(), dtype=x.dtype), SSIM_WINDOW // 2
    taps = torch.arange(-half, half + 1) + torch.arange(3)[:, None]  # (3, 11), of each channel
    mix = (F.one_hot(taps.clamp(0, 2), 3) * weights[:, None]).sum(dim=1)  # (3, 3)
    mixed = torch.einsum("oc,nchw->nohw", mix.to(x.device), x)
    return _window_mean(F.pad(mixed, (half, half, half, half), mode="replicate"))


def _luma(pixels01: Tensor) -> Tensor:
    """BT.601 luma as MATLAB computes it from 8 bits, in 1/255: (N, 3, H, W) -> (N, 1, H, W)."""
    levels = (255 * pixels01).round()
    luma = torch.einsum("c,nchw->nhw", levels.new_tensor(LUMA), levels).unsqueeze(1)
    return ((luma / 255_000 + 0.5).floor() + 16) / 255


def _haar(scale: int, like: Tensor) -> Tensor:
    """A Haar wavelet of 2^scale x 2^scale that sees horizontal edges."""
    side = 2**scale
    wavelet = like.new_full((side, side), 1 / side)
    wavelet[: side // 2] *= -1
    return wavelet


def _same(planes: Tensor, kernel: Tensor) -> Tensor:
    """Correlation with an even square kernel, (N, H, W) -> (N, H, W), zeros around.

    MATLAB's centre: as many rows before a position as after it, and one more after it.
    """
    before, after = kernel.shape[0] // 2 - 1, kernel.shape[0] // 2
    padded = F.pad(planes.unsqueeze(1), (before, after, before, after))
    return F.conv2d(padded, kernel[None, None]).squeeze(1)


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """HaarPSI's similarity of two magnitudes, eq. 6."""
    return (2 * a * b + HAARPSI_C) / (a**2 + b**2 + HAARPSI_C)


def _detail(x: Tensor) -> Tensor:
    """Local energy of fine detail, (N, 3, H, W) -> (N, 1, H - 20, W - 20)."""
    fine = _inner(x) - _window_mean(x)
    return _window_mean(fine.square().mean(dim=1, keepdim=True))


def check_range(pixels01: Tensor, what: str) -> None:
    """Raise InputError for values outside [0, 1]; `what` says whose they are."""
    low, high = pixels01.min().item(), pixels01.max().item()  # NaN if any value is
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise InputError(
            f"{what}: expected finite values in [0, 1], got {low:.6g}..{high:.6g}: convert [-1, 1] "
            "with ipx2p.images.pixels01_from_pixels"
        )


def _checked(pixels01: Tensor, reference01: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Both batches in float64, or an InputError that says what is wrong with them."""
    if pixels01.shape != reference01.shape:
        shapes = f"{tuple(pixels01.shape)} and {tuple(reference01.shape)}"
        raise InputError(
            f"metrics: the two batches differ in shape: {shapes}: resize one to the other"
        )
    for name, pixels in (("first", pixels01), ("second", reference01)):
        is_batch = pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.numel() > 0
        if not (is_batch and pixels.is_floating_point()):
            dtype = str(pixels.dtype).removeprefix("torch.")
            raise InputError(
                f"metrics: expected float (N, 3, H, W), got {dtype} {tuple(pixels.shape)} as the "
                f"{name} batch: see ipx2p.images for conversions"
            )
        check_range(pixels, f"metrics, {name} batch")
    height, width = pixels01.shape[-2:]
    if min(height, width) < least:
        raise InputError(
            f"metrics: expected pictures of at least {least} x {least}, got {width} x {height} "
            "(width x height): use psnr for pictures this small"
        )
    return pixels01.double(), reference01.double()
