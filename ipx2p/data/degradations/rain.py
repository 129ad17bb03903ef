"""Rain between the camera and the scene: layers of streaks, sometimes with mist (layer 2).

During the exposure a falling drop smears into a streak. It covers a pixel for a fraction a of the
time and shows light from the whole sky, which a drop gathers like a wide-angle lens: the pixel
becomes (1 - a) * background + a * sky light (Garg and Nayar 2007, "Vision and Rain"). Streaks at
all distances add up in layers; in some pictures those too far to be seen one by one form a veil,
as fog does (Li et al. 2016; Yang et al. 2017; Hu et al. 2019).
Sizes are fractions of the picture's short side, so that results look alike at any resolution.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ipx2p.data.light import linear_from_srgb, setting, splat, srgb_from_linear, uniform

# Distances of the layers relative to the focal plane. A layer shows streaks at 1 / distance of
# their size, and distance^2 times as many of them.
LAYERS = (0.35, 0.6, 1.0, 1.7, 3.0)
DEFOCUS = 0.004  # half-width added to a streak per unit of |1 / distance - 1|
SPACING = 0.9  # between the points of which a streak is made, in cells of the grid


@dataclass
class RainConfig:
    """Rain: ranges from which each picture draws uniformly, in fractions of the short side."""

    drops: list[float] = setting([400.0, 2800.0], most=20_000)  # per square of the short side
    length: list[float] = setting([0.05, 0.2], most=1)  # of a streak in focus
    opacity: list[float] = setting([0.3, 0.7], most=1)  # of a streak in focus
    misty: float = setting(0.2, most=1)  # share of the pictures that have mist too
    veil: list[float] = setting([0.05, 0.4], most=10)  # optical depth of the mist
    width: float = setting(0.0045, most=1)  # of a streak in focus
    lean: float = setting(20.0, most=90)  # wind slants the rain by up to this many degrees
    gust: float = setting(2.5, most=90)  # standard deviation of the slant between streaks, degrees


def rain(pixels01: Tensor, generator: torch.Generator, config: RainConfig) -> Tensor:
    """A picture (3, H, W) as it looks through rain."""
    ranges = (config.drops, config.length, config.opacity, config.veil, (0.0, 1.0))
    drops, length, opacity, veil, chance = (uniform(bounds, generator) for bounds in ranges)
    lean = uniform([-config.lean, config.lean], generator)
    size = pixels01.shape[-2:]
    light = linear_from_srgb(pixels01)
    sky = sky_light(light)
    if chance < config.misty:
        mist = 1 - torch.exp(-veil * far_fields(size, generator))
        light = torch.lerp(light, 0.7 * sky, mist.to(light))

    num_drops = drops * size[0] * size[1] / min(size) ** 2 / sum(z**2 for z in LAYERS)
    depth = torch.zeros(size)
    for distance in LAYERS:
        draws = torch.rand(round(num_drops * distance**2), 8, generator=generator)
        normal = (math.sqrt(2) * torch.erfinv(2 * draws[:, 0] - 1)).clamp(-3, 3)
        angles = torch.deg2rad(lean + config.gust * normal)
        depth += streaks(size, draws, angles, distance, length, config.width)
    covered = 1 - (1 - opacity) ** depth
    light = torch.lerp(light, sky, covered.to(light))
    return srgb_from_linear(light.clamp(0, 1))


def sky_light(light: Tensor) -> Tensor:
    """The sky's colour and brightness in linear light (3, 1, 1), estimated from the exposure.

    Exposure meters bring a scene to a mean of about 0.18; an overcast sky is five times as bright,
    and a little bluer than the scene.
    """
    mean = light.mean((1, 2))
    level = (5 * mean.mean()).clamp(0.35, 0.95)
    tint = 0.85 + 0.15 * mean / mean.mean().clamp(min=1e-6)
    blue = torch.tensor([0.97, 1.0, 1.03], device=light.device)
    return (level * tint * blue).view(3, 1, 1)


def far_fields(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """How much mist is in front of each pixel, (H, W), about 1: more at the top, which is usually
    farther away, and uneven, like drifting rain."""
    drifts = torch.randn(1, 1, 5, 5, generator=generator)
    drifts = functional.interpolate(drifts, size, mode="bicubic", align_corners=True)[0, 0]
    slope = torch.linspace(0.4, -0.4, size[0])[:, None]
    return (1 + slope + 0.25 * drifts).clamp(min=0)


def streaks(
    size: tuple[int, int],
    draws: Tensor,
    angles: Tensor,
    distance: float,
    length: float,
    width: float,
) -> Tensor:
    """How many streaks of one layer cover each pixel, (H, W), on the CPU.

    A streak fades at its ends, flickers along its length, since the falling drop oscillates (Garg
    and Nayar 2006), and becomes wider and paler out of focus.

    Args:
        draws: (N, 8) in [0, 1], the random numbers of each streak. angles: (N,) in radians, from
            the vertical. length, width: of a streak in focus, in fractions of the short side.
    """
    if len(draws) == 0:
        return torch.zeros(size)
    nearness = (0.75 + 0.5 * draws[:, 1]) / distance
    lengths = length * nearness * (0.6 + 0.8 * draws[:, 2])
    sharp = width / 2 * nearness
    half_widths = (sharp + DEFOCUS * (nearness - 1).abs()).clamp(min=1e-6)
    brightness = sharp / half_widths * (0.25 + 0.75 * draws[:, 3] ** 2)

    # Drawn on a grid just fine enough for the thinnest streak, then upsampled.
    cell = max(1.0, half_widths.min().item() * min(size) / 2)  # in pixels
    grid = [math.ceil(side / cell) for side in size]
    lengths, half_widths = (sizes * min(size) / cell for sizes in (lengths, half_widths))
    margin = lengths.max()
    centres = draws[:, 4:6] * (torch.tensor(grid) + margin) - margin / 2  # (N, 2), y and x

    num_along = max(1, math.ceil(lengths.max() / SPACING))
    num_across = math.ceil(2 * half_widths.max() / SPACING)
    along = (torch.arange(num_along) + 0.5) / num_along - 0.5  # (A,), -0.5 .. 0.5
    across = (torch.arange(num_across) + 0.5) / num_across * 2 - 1  # (C,), -1 .. 1
    ends = ((0.5 - along.abs()) / 0.35).clamp(max=1)
    phase = along * (2 + 4 * draws[:, 6, None]) + draws[:, 7, None]
    profile = ends**2 * (3 - 2 * ends) * (1 + 0.3 * torch.cos(2 * math.pi * phase))  # (N, A)
    area = lengths / num_along * 2 * half_widths / num_across  # of a point
    weights = (profile * (brightness * area)[:, None])[..., None] * (1 - across**2) ** 2

    down = torch.stack([angles.cos(), angles.sin()], -1)
    aside = torch.stack([-angles.sin(), angles.cos()], -1)
    spine = centres[:, None] + down[:, None] * (lengths[:, None] * along)[..., None]
    rib = aside[:, None] * (half_widths[:, None] * across)[..., None]
    drawn = splat(spine[:, :, None] + rib[:, None], weights, *grid)  # points (N, A, C, 2)
    return functional.interpolate(drawn[None, None], size, mode="bilinear")[0, 0]
