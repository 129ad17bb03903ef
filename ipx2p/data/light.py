"""Building blocks of the degradations: linear light, random severities, splats, blurs (layer 2).

Light adds up in linear space, not in the sRGB values of a file, so the degradations act there.
"""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from ipx2p.errors import InputError
from ipx2p.images import RANGE_TOLERANCE


def setting(default: float | list[float], **limits: float) -> Any:
    """A dataclass field: a number, or a range [low, high] from which each picture draws.

    Args:
        limits: `least` and `most` that a value may be; `mild_is_high` where low values are severe.
    """
    is_range = isinstance(default, list)
    return field(default_factory=lambda: [*default] if is_range else default, metadata=limits)


def uniform(bounds: Sequence[float], generator: torch.Generator) -> float:
    """A number drawn uniformly from [low, high]."""
    low, high = bounds
    return low + (high - low) * torch.rand((), generator=generator).item()


def check_pixels01(pixels01: Tensor, where: str) -> None:
    """Raise InputError for anything but ([N,] 3, H, W), float32 in [0, 1]."""
    shape = tuple(pixels01.shape)
    is_picture = len(shape) in (3, 4) and shape[-3] == 3 and pixels01.numel() > 0
    if not is_picture or pixels01.dtype != torch.float32:
        dtype = str(pixels01.dtype).removeprefix("torch.")
        raise InputError(f"{where}: expected float32 pixels01 ([N,] 3, H, W), got {dtype} {shape}")
    low, high = pixels01.min().item(), pixels01.max().item()
    if not -RANGE_TOLERANCE <= low <= high <= 1 + RANGE_TOLERANCE:  # NaN too
        raise InputError(f"{where}: expected pixels01 in [0, 1], got {low:.6g}..{high:.6g}")


def linear_from_srgb(pixels01: Tensor) -> Tensor:
    """sRGB values to linear light (IEC 61966-2-1), [0, 1] to [0, 1]."""
    bent = ((pixels01 + 0.055) / 1.055).clamp(min=0).pow(2.4)
    return torch.where(pixels01 <= 0.04045, pixels01 / 12.92, bent)


def srgb_from_linear(light: Tensor) -> Tensor:
    """Linear light to sRGB values (IEC 61966-2-1), [0, 1] to [0, 1]."""
    bent = 1.055 * light.clamp(min=0.0031308).pow(1 / 2.4) - 0.055
    return torch.where(light <= 0.0031308, light * 12.92, bent)


def splat(points: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """Add weights at fractional positions to a grid, each bilinearly to its four nearest pixels.

    Args:
        points: (..., 2), y and x in pixels, integers at pixel centres. weights: (...).
    Returns: (height, width), float32 on the CPU; weights outside the grid are dropped.
    """
    # A border of two pixels collects what falls outside.
    y, x = points.reshape(-1, 2).unbind(-1)
    y, x = (y + 2).clamp(0, height + 2), (x + 2).clamp(0, width + 2)
    top, left = y.floor(), x.floor()
    lower, right = (y - top) * weights.reshape(-1), x - left
    upper = weights.reshape(-1) - lower
    corner = top.long() * (width + 4) + left.long()
    total = torch.zeros((height + 4) * (width + 4))
    for step, part in ((0, upper), (width + 4, lower)):
        total.index_add_(0, corner + step, part * (1 - right))
        total.index_add_(0, corner + step + 1, part * right)
    return total.view(height + 4, width + 4)[2:-2, 2:-2].contiguous()


def convolve(light: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel with one kernel, with mirrored borders.

    Uses the FFT, so that the time hardly depends on the size of the kernel.

    Args:
        light: (C, H, W). kernel: (2 * R + 1, 2 * R + 1), which may be larger than the picture.
    """
    radius = kernel.shape[-1] // 2
    height, width = light.shape[-2:]
    rows, columns = (_mirrored(side, radius).to(light.device) for side in (height, width))
    extended = light[..., rows, :][..., columns]
    size = [_fast_size(side) for side in extended.shape[-2:]]
    spectrum = torch.fft.rfft2(extended, s=size) * torch.fft.rfft2(kernel.to(light), s=size)
    blurred = torch.fft.irfft2(spectrum, s=size)
    return blurred[..., 2 * radius :, 2 * radius :][..., :height, :width]


def _mirrored(side: int, margin: int) -> Tensor:
    """Indices -margin .. side + margin - 1, mirrored about the centres of the border pixels."""
    index = torch.arange(-margin, side + margin) % max(1, 2 * side - 2)
    return torch.minimum(index, (2 * side - 2 - index).abs())


def _fast_size(side: int) -> int:
    """The next size without a prime factor above 5, for which the FFT is fast."""
    while 30**32 % side:  # all such numbers below 2^32 divide it
        side += 1
    return side
