"""Distances between two batches of pictures: PSNR, SSIM, L1, L2 (layer 0, torch only).

All take `pixels01`, float in [0, 1], (N, 3, H, W), and give one value per sample, (N,) float64,
computed in float64 on the device of the input. Anything else is refused: a metric fed with another
range gives numbers that look right. Higher is better for PSNR and SSIM, lower for L1 and L2.
`METRICS` lists those of validation: a new one is one more entry.
"""

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


def l1(pixels01: Tensor, reference01: Tensor) -> Tensor:
    """Mean absolute difference over channels and positions, in [0, 1]."""
    a, b = _checked(pixels01, reference01)
    return (a - b).abs().mean(dim=(1, 2, 3))


def l2(pixels01: Tensor, reference01: Tensor) -> Tensor:
    """Mean squared difference over channels and positions, in [0, 1]; no root is taken."""
    a, b = _checked(pixels01, reference01)
    return (a - b).square().mean(dim=(1, 2, 3))


def psnr(pixels01: Tensor, reference01: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / mean squared difference); inf if identical."""
    return -10 * l2(pixels01, reference01).log10()


def ssim(pixels01: Tensor, reference01: Tensor) -> Tensor:
    """Structural similarity of Wang et al. 2004 (IEEE TIP 13(4), eq. 13), at most 1.

    Computed for each channel where the whole 11 x 11 window lies inside the picture, with the
    window's own (population) covariance, then averaged over positions and channels. Pictures are
    not converted to grey and not reduced in size before.
    Raises: InputError also if a side is shorter than the window, which is never made smaller.
    """
    a, b = _checked(pixels01, reference01)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise InputError(
            f"ssim: expected pictures of at least {SSIM_WINDOW} x {SSIM_WINDOW}, got "
            f"{a.shape[-1]} x {a.shape[-2]} (width x height): use psnr for pictures this small"
        )
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = _window_mean(a * a) - mean_a**2
    var_b = _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (var_a + var_b + SSIM_C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


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


def _window_mean(x: Tensor) -> Tensor:
    """Gaussian mean of every full window: (N, 3, H, W) -> (N, 3, H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights = (weights / weights.sum()).view(1, 1, -1, 1)
    planes = x.flatten(0, 1).unsqueeze(1)  # (N, 3, H, W) -> (3 N, 1, H, W)
    blurred = F.conv2d(F.conv2d(planes, weights), weights.transpose(2, 3))
    return blurred.squeeze(1).unflatten(0, x.shape[:2])


def _checked(pixels01: Tensor, reference01: Tensor) -> tuple[Tensor, Tensor]:
    """Both batches in float64, or an InputError that says what is wrong with them."""
    if pixels01.shape != reference01.shape:
        shapes = f"{tuple(pixels01.shape)} and {tuple(reference01.shape)}"
        raise InputError(
            f"metrics: the two batches differ in shape: {shapes}: resize one to the other"
        )
    for name, pixels in (("first", pixels01), ("second", reference01)):
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            dtype = str(pixels.dtype).removeprefix("torch.")
            raise InputError(
                f"metrics: expected float (N, 3, H, W), got {dtype} {tuple(pixels.shape)} as the "
                f"{name} batch: see ipx2p.images for conversions"
            )
        if pixels.numel() == 0:
            raise InputError(
                f"metrics: expected pictures, got none in a batch {tuple(pixels.shape)}"
            )
        low, high = pixels.min().item(), pixels.max().item()  # NaN if any value is
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
            raise InputError(
                f"metrics: expected finite values in [0, 1], got {low:.6g}..{high:.6g} in the "
                f"{name} batch: convert [-1, 1] with ipx2p.images.pixels01_from_pixels"
            )
    return pixels01.double(), reference01.double()
