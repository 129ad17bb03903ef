"""Light on a grid: what the degradations of photographs are made of (layer 2).

Light adds up in linear light, not in the sRGB values of a file, so that is where they act.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_from_srgb(pixels01: Tensor) -> Tensor:
    """sRGB values to linear light (IEC 61966-2-1), [0, 1] to [0, 1]."""
    bent = ((pixels01 + 0.055) / 1.055).clamp(min=0).pow(2.4)
    return torch.where(pixels01 <= 0.04045, pixels01 / 12.92, bent)


def srgb_from_linear(light: Tensor) -> Tensor:
    """Linear light to sRGB values (IEC 61966-2-1), [0, 1] to [0, 1]."""
    bent = 1.055 * light.clamp(min=0.0031308).pow(1 / 2.4) - 0.055
    return torch.where(light <= 0.0031308, light * 12.92, bent)


def uniform(bounds: Sequence[float], generator: torch.Generator) -> float:
    """A number drawn uniformly from [low, high]."""
    low, high = bounds
    return low + (high - low) * torch.rand((), generator=generator).item()


def splat(points: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """Weights at points between pixels, each shared by the four pixels around it.

    Args:
        points: (..., 2), y and x in pixels, whole numbers at pixel centres. weights: (...).
    Returns: (height, width), float32 on the CPU; what falls outside is lost.
    """
    # A frame of two pixels takes up what falls outside.
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
    """Each channel blurred by one kernel; beyond its borders the picture goes on mirrored.

    Through Fourier space, so that the time hardly depends on the kernel's size.

    Args:
        light: (C, H, W). kernel: (2 * R + 1, 2 * R + 1) of any R, also beyond the picture's size.
    """
    radius = kernel.shape[-1] // 2
    height, width = light.shape[-2:]
    rows, columns = (_mirrored(side, radius).to(light.device) for side in (height, width))
    extended = light[..., rows, :][..., columns]
    size = [_quick_size(side) for side in extended.shape[-2:]]
    spectrum = torch.fft.rfft2(extended, s=size) * torch.fft.rfft2(kernel.to(light), s=size)
    blurred = torch.fft.irfft2(spectrum, s=size)
    return blurred[..., 2 * radius :, 2 * radius :][..., :height, :width]


def _mirrored(side: int, margin: int) -> Tensor:
    """Indices -margin .. side + margin - 1, mirrored at the centres of the border pixels."""
    index = torch.arange(-margin, side + margin) % max(1, 2 * side - 2)
    return torch.minimum(index, (2 * side - 2 - index).abs())


def _quick_size(side: int) -> int:
    """The next size that has no prime factor above 5, which Fourier transforms are quick for."""
    while True:
        rest = side
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return side
        side += 1
