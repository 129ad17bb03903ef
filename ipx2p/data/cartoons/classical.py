"""A cartoon of a photograph without learned weights: flat colours and ink lines (layer 2).

It works in OKLab (Ottosson 2020), which is roughly perceptually uniform. Bilateral passes flatten
textures; a Kuwahara filter turns what is left into patches with sharp borders; lightness is
quantised to a few levels (Winnemoeller et al., "Real-Time Video Abstraction", 2006); a difference
of Gaussians, smoothed along the edges (Kang et al., "Coherent Line Drawing", 2007), is thresholded
to lines (Winnemoeller et al., "XDoG", 2012). Nothing in it is random.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ipx2p.data.light import linear_from_srgb, srgb_from_linear

VERSION = 1  # increases whenever the results change

# Lengths are in pixels of a 512 x 512 picture and scale with its sides.
SMALLEST_SCALE = 0.6  # below, they would be less than a pixel
CHROMA_WEIGHT = 2.0  # of a distance in chroma, relative to one in lightness
PASSES = ((2.5, 0.065), (3.0, 0.055))  # bilateral: standard deviation in space, and in colour
REACH = 3  # neighbours on each side in a bilateral pass, out to two standard deviations
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
PATCH = 2.0  # of the Kuwahara filter: how far its windows lie from the pixel
LEVELS, STEEPNESS = 8, 5.0  # of lightness, and of the borders between them
SATURATION = 1.25
LINE_WIDTH, LINE_THRESHOLD, LINE_STEEPNESS = 0.9, 0.004, 100.0
CHROMA_LINES = 0.5  # weight of edges between colours of equal lightness
FLOW_WIDTH, FLOW_LENGTH = 2.5, 3.5  # neighbourhood that sets the direction; smoothing along it

_LMS_FROM_LINEAR = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LAB_FROM_LMS = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def oklab_from_pixels01(pixels01: Tensor) -> Tensor:
    """sRGB (N, 3, H, W) to OKLab: lightness in [0, 1], then green-red and blue-yellow."""
    lms = _mix(_LMS_FROM_LINEAR, linear_from_srgb(pixels01))
    return _mix(_LAB_FROM_LMS, lms.clamp(min=0).pow(1 / 3))


def pixels01_from_oklab(lab: Tensor) -> Tensor:
    """The inverse; colours outside sRGB are clipped, channel by channel."""
    lms = _mix(torch.tensor(_LAB_FROM_LMS).inverse(), lab).pow(3)
    return srgb_from_linear(_mix(torch.tensor(_LMS_FROM_LINEAR).inverse(), lms).clamp(0, 1))


def _mix(matrix: Sequence | Tensor, x: Tensor) -> Tensor:
    """Multiply the three values of every pixel by a matrix."""
    return torch.einsum("ij,njhw->nihw", torch.as_tensor(matrix).to(x), x)


def _bilateral(x: Tensor, spread: float, colour_range: float) -> Tensor:
    """Means over neighbours of similar colour, along each of `DIRECTIONS` in turn.

    Tomasi and Manduchi 1998, one dimension at a time. Windows are clipped at the borders.
    """
    height, width = x.shape[-2:]
    for down, right in DIRECTIONS:
        length = math.hypot(down, right)
        moved, total = torch.zeros_like(x), torch.ones_like(x[:, :1])
        for neighbour in range(1, REACH + 1):
            steps = max(neighbour, round(2 * spread * neighbour / (REACH * length)))
            y, z = steps * down, steps * right
            if y >= height or abs(z) >= width:
                break
            # Both pixels of each pair at once, one in `here` and the other in `there`.
            here = (..., slice(0, height - y), slice(max(-z, 0), width - max(z, 0)))
            there = (..., slice(y, height), slice(max(z, 0), width - max(-z, 0)))
            difference = x[there] - x[here]
            distance = difference.square().sum(1, keepdim=True)
            near = -0.5 * (steps * length / spread) ** 2
            weight = (distance * (-0.5 / colour_range**2) + near).exp()
            difference *= weight
            moved[here] += difference
            moved[there] -= difference
            total[here] += weight
            total[there] += weight
        x = x + moved / total
    return x


def _kuwahara(x: Tensor, offset: float) -> Tensor:
    """Every pixel takes the colour of the most uniform of nine windows around it.

    Papari et al. 2007, eq. 14: means weighted by a negative power of the standard deviation.
    """
    power, floor = 8, 2e-5  # the floor is an invisible variance
    squares = x.square().sum(1, keepdim=True)
    blurred = _blur(torch.cat([x, squares], 1), 0.6 * offset)
    mean = blurred[:, :-1]
    variance = (blurred[:, -1:] - mean.square().sum(1, keepdim=True)).clamp(min=0)
    weight = (1 + variance / floor).pow(-power / 2)
    windows = torch.cat([mean * weight, weight], 1)
    straight, diagonal = max(1, round(offset)), max(1, round(offset * math.sqrt(0.5)))
    padded = F.pad(windows, (straight,) * 4, mode="replicate")
    total = windows.clone()
    height, width = x.shape[-2:]
    for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
        far = diagonal if down and right else straight
        y, z = straight + far * down, straight + far * right
        total += padded[..., y : y + height, z : z + width]
    return total[:, :-1] / total[:, -1:]


def _round_softly(lightness: Tensor) -> Tensor:
    """Lightness in a few levels with soft borders (Winnemoeller et al. 2006, eq. 4)."""
    border = (lightness * LEVELS).floor() + 0.5  # so that black and white are levels
    return (border + 0.5 * (2 * STEEPNESS * (lightness * LEVELS - border)).tanh()) / LEVELS


def _ink(lab: Tensor, scale: float) -> Tensor:
    """Lines on the dark sides of edges: (N, 1, H, W), 1 for ink and 0 for paper."""
    width = LINE_WIDTH * scale
    contrast = _blur(lab, width) - _blur(lab, 1.6 * width)
    lightness, chroma = contrast[:, :1], contrast[:, 1:].square().sum(1, keepdim=True).sqrt()
    edges = lightness - CHROMA_LINES / CHROMA_WEIGHT * chroma
    edges = _smooth_along(edges, _edge_directions(lab, FLOW_WIDTH * scale), FLOW_LENGTH * scale)
    return (LINE_STEEPNESS * (-edges - LINE_THRESHOLD).clamp(min=0)).tanh()


def _edge_directions(lab: Tensor, spread: float) -> Tensor:
    """Unit vectors (right, down) along the edges, (N, H, W, 2), from the structure tensor."""
    height, width = lab.shape[-2:]
    padded = F.pad(lab, (1, 1, 1, 1), mode="replicate")
    right = padded[..., 1:-1, 2:] - padded[..., 1:-1, :width]
    down = padded[..., 2:, 1:-1] - padded[..., :height, 1:-1]
    tensor = torch.stack([(right.square() - down.square()).sum(1), (right * down).sum(1)], 1)
    even, odd = _blur(tensor, spread).unbind(1)
    across = 0.5 * torch.atan2(2 * odd, even)
    return torch.stack([-across.sin(), across.cos()], -1)


def _smooth_along(x: Tensor, directions: Tensor, spread: float) -> Tensor:
    """Gaussian means of (N, 1, H, W) along unit vectors (N, H, W, 2), twice to follow curves."""
    size = torch.tensor(x.shape[:1:-1], dtype=x.dtype, device=x.device)  # width, height
    axes = [torch.arange(side, dtype=x.dtype, device=x.device) for side in x.shape[-2:]]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    places = (2 * torch.stack([columns, rows], -1) + 1) / size - 1  # in grid_sample coordinates
    pixel = directions * (2 / size)
    lengths = [2 * spread * step / 3 for step in range(1, 4)]
    for _ in range(2):
        total, weights = x.clone(), 1.0
        for length in lengths:
            weight = math.exp(-0.5 * (length / spread) ** 2)
            for signed in (length, -length):
                grid = places + signed * pixel
                total += weight * F.grid_sample(x, grid, padding_mode="border", align_corners=False)
                weights += weight
        x = total / weights
    return x


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with replicated borders; on a CPU, sums of slices are faster than conv2d."""
    radius = math.ceil(2.5 * sigma)
    taps = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-radius, radius + 1)]
    for dim, padding in ((-1, (radius, radius, 0, 0)), (-2, (0, 0, radius, radius))):
        padded, side = F.pad(x, padding, mode="replicate"), x.shape[dim]
        x = torch.zeros_like(x)
        for start, tap in enumerate(taps):
            x.add_(padded.narrow(dim, start, side), alpha=tap / sum(taps))
    return x


def cartoonize(pixels01: Tensor) -> Tensor:
    """Cartoons of photographs, (N, 3, H, W) in [0, 1], without learned weights."""
    scale = max(SMALLEST_SCALE, math.sqrt(pixels01.shape[-2] * pixels01.shape[-1]) / 512)
    weights = torch.tensor([1, CHROMA_WEIGHT, CHROMA_WEIGHT], device=pixels01.device).view(3, 1, 1)
    lab = oklab_from_pixels01(pixels01) * weights
    (sharp_spread, sharp_range), (flat_spread, flat_range) = PASSES
    sharp = _bilateral(lab, sharp_spread * scale, sharp_range)
    flat = _bilateral(sharp, flat_spread * scale, flat_range)
    flat = _kuwahara(flat, PATCH * scale) / weights
    paint = torch.cat([_round_softly(flat[:, :1]), SATURATION * flat[:, 1:]], 1)
    return pixels01_from_oklab(paint) * (1 - _ink(sharp, scale))
