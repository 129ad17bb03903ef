"""Restoration without learning: what a trained model has to beat (layer 4).

Each method looks at the picture alone; its few constants are fixed. A task is missing where no
simple filter was better than the picture as it is, in PSNR and in SSIM. So it is with rain: medians
and openings across the streaks remove more detail than rain.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ipx2p.data.degradations.blur import gaussian_kernel
from ipx2p.data.light import convolve, linear_from_srgb, srgb_from_linear
from ipx2p.images import image_from_pixels01, pixels01_from_image

NORMAL_MEDIAN = 0.6745  # the median of |x| of the standard normal distribution
RADIUS = 6  # of the bilateral window, in pixels, two standard deviations
CLOSENESS = 3.0  # standard deviation of its weights in space, in pixels
LIKENESS = 3.0  # the same in colour, in standard deviations of the noise
WHITE = 0.999  # of the pixels are darker than white
DARKEST = 1e-4  # a white point below this is a black picture
SOFTNESS = 0.01  # standard deviation of the unsharp mask, as a part of the short side
SHARPENING = 0.3  # its strength


def denoise(pixels01: Tensor) -> Tensor:
    """A bilateral filter (Tomasi and Manduchi 1998) as strong as the picture's own noise.

    (3, H, W) -> (3, H, W), both in [0, 1].
    """
    width = LIKENESS * noise_level(pixels01)
    if width == 0:
        return pixels01
    total, weights = torch.zeros_like(pixels01), torch.zeros_like(pixels01[:1])
    for distance2, moved in _neighbours(pixels01):
        unlike2 = (moved - pixels01).square().mean(0, keepdim=True)  # (1, H, W)
        weight = torch.exp(-distance2 / (2 * CLOSENESS**2) - unlike2 / (2 * width**2))
        total += weight * moved
        weights += weight
    return total / weights


def noise_level(pixels01: Tensor) -> float:
    """The standard deviation of the noise, by the median of diagonal Haar details.

    Donoho and Johnstone 1994, sec. 4.2, but of the picture at half its size: a camera's noise is
    smooth from pixel to pixel, since it was interpolated between the sites of the sensor.
    """
    halved = F.avg_pool2d(pixels01[None], 2)[0] if min(pixels01.shape[-2:]) >= 4 else pixels01
    height, width = (side // 2 * 2 for side in halved.shape[-2:])
    if min(height, width) == 0:
        return 0.0
    a, b, c, d = (halved[:, y:height:2, x:width:2] for y in (0, 1) for x in (0, 1))
    detail = (a - b - c + d) / 2
    return (detail.abs().flatten(1).median(1).values.mean() / NORMAL_MEDIAN).item()


def enhance(pixels01: Tensor) -> Tensor:
    """Auto-contrast in linear light, then `denoise`: the light of a dark picture's noise grows too.

    The brightest thousandth of the pixels becomes white, by each pixel's largest channel.
    """
    light = linear_from_srgb(pixels01)
    brightest = light.amax(0).flatten()
    white = brightest.kthvalue(math.ceil(WHITE * len(brightest))).values.clamp(min=DARKEST)
    return denoise(srgb_from_linear((light / white).clamp(0, 1)))


def deblur(pixels01: Tensor) -> Tensor:
    """An unsharp mask: a part of what a Gaussian removes is added."""
    soft = convolve(pixels01, gaussian_kernel(SOFTNESS * min(pixels01.shape[-2:])))
    return (pixels01 + SHARPENING * (pixels01 - soft)).clamp(0, 1)


def _neighbours(pixels01: Tensor) -> Iterator[tuple[int, Tensor]]:
    """All pixels within `RADIUS`: squared distances, and pictures moved by them."""
    height, width = pixels01.shape[-2:]
    border = [min(RADIUS, side - 1) for side in (height, width)]
    padded = F.pad(pixels01[None], (border[1],) * 2 + (border[0],) * 2, mode="reflect")[0]
    for y in range(2 * border[0] + 1):
        for x in range(2 * border[1] + 1):
            moved = padded[:, y : y + height, x : x + width]
            yield (y - border[0]) ** 2 + (x - border[1]) ** 2, moved


def _of(tasks: Sequence[str]) -> Callable[[Image.Image], Image.Image]:
    def restore(image: Image.Image) -> Image.Image:
        pixels01 = pixels01_from_image(image)
        for task in reversed(tasks):  # what happened to the picture last is undone first
            pixels01 = METHODS[task](pixels01)
        return image_from_pixels01(pixels01)

    return restore


METHODS = {"deblur": deblur, "enhance": enhance, "denoise": denoise}  # in the order of nature
# By task, and by tasks that are undone together if each has a method.
CLASSICAL: dict[str, Callable[[Image.Image], Image.Image]] = {
    "+".join(tasks): _of(tasks)
    for count in range(1, len(METHODS) + 1)
    for tasks in combinations(METHODS, count)
}
