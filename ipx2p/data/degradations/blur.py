"""Blur of a photograph: camera shake, or a lens out of focus (layer 2).

Sizes are fractions of the picture's short side, so that results look alike at any resolution.
"""

import cmath
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ipx2p.data.light import convolve, linear_from_srgb, setting, splat, srgb_from_linear, uniform

PATH_STEPS = 512  # of a shaken camera's path; a step stays below a pixel up to 4K


@dataclass
class BlurConfig:
    """Blur: weights of its kinds, one of which each picture draws, and ranges of their sizes.

    Sizes are drawn uniformly, in fractions of the short side.
    """

    motion: float = setting(0.6)  # camera shake
    defocus: float = setting(0.25)  # a lens out of focus: a disc
    gaussian: float = setting(0.15)  # a soft lens, or many small errors
    length: list[float] = setting([0.03, 0.12], most=1)  # of the camera's path
    radius: list[float] = setting([0.006, 0.02], most=1)  # of the disc
    sigma: list[float] = setting([0.004, 0.012], most=1)  # of the Gaussian


def blur(pixels01: Tensor, generator: torch.Generator, config: BlurConfig) -> Tensor:
    """A picture (3, H, W) blurred in linear light by one kernel of a random kind and size."""
    short = min(pixels01.shape[-2:])
    weights = torch.tensor([config.motion, config.defocus, config.gaussian])
    kind = int(torch.multinomial(weights, 1, generator=generator))
    if kind == 0:
        path = camera_path(generator)
        kernel = path_kernel(path * uniform(config.length, generator) * short)
    elif kind == 1:
        kernel = disc_kernel(uniform(config.radius, generator) * short)
    else:
        kernel = gaussian_kernel(uniform(config.sigma, generator) * short)
    light = convolve(linear_from_srgb(pixels01), kernel)
    return srgb_from_linear(light.clamp(0, 1))


def camera_path(generator: torch.Generator) -> Tensor:
    """Where a shaking camera points during the exposure: (PATH_STEPS, 2), a path of length 1.

    A random walk at constant speed: tremor turns it, a pull brings it back towards the start, and
    an occasional jerk nearly reverses it (Boracchi and Foi 2012, sec. III; Kupyn et al. 2018,
    algorithm 1). The centre of mass is 0.
    """
    pull = uniform([0.0, 0.7], generator)
    tremor = uniform([0.0, 0.7], generator) * math.sqrt(10 / PATH_STEPS)
    jerks = uniform([0.0, 3.0], generator)  # expected number during the exposure
    normal = torch.randn(PATH_STEPS, 2, generator=generator).tolist()
    chance, turn = torch.rand(2, PATH_STEPS, generator=generator).tolist()
    place, path = 0j, []
    velocity = cmath.exp(2j * math.pi * turn[0])
    for step in range(PATH_STEPS):
        path.append((place.imag, place.real))
        velocity += tremor * complex(*normal[step]) - pull * place * 20 / PATH_STEPS
        if chance[step] < jerks / PATH_STEPS:
            velocity *= cmath.exp(1j * (math.pi + turn[step] - 0.5))
        velocity /= abs(velocity)
        place += velocity / PATH_STEPS
    points = torch.tensor(path)
    return points - points.mean(0)


def path_kernel(path: Tensor) -> Tensor:
    """A path (P, 2) in pixels as a kernel of odd size that sums to 1; equal time per point."""
    radius = math.ceil(path.abs().max().item()) + 1
    side = 2 * radius + 1
    return splat(path + radius, torch.full((len(path),), 1 / len(path)), side, side)


def disc_kernel(radius: float) -> Tensor:
    """A uniform disc with an anti-aliased rim (radius in pixels), sum 1."""
    distance = _distances(math.ceil(radius) + 1)
    disc = (radius + 0.5 - distance).clamp(0, 1)
    return disc / disc.sum()


def gaussian_kernel(sigma: float) -> Tensor:
    """A Gaussian (sigma in pixels) out to four sigma, sum 1."""
    distance = _distances(math.ceil(4 * sigma) + 1)
    bell = torch.exp(-0.5 * (distance / max(sigma, 1e-3)) ** 2)
    return bell / bell.sum()


def _distances(radius: int) -> Tensor:
    """Distances from the centre of a kernel, in pixels, (2 * radius + 1, 2 * radius + 1)."""
    offset = torch.arange(-radius, radius + 1).float()
    return torch.hypot(offset[:, None], offset[None])
