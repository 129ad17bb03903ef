"""What a camera's sensor does to the light: noise, underexposure, JPEG compression (layer 2).

Noise lives on pixels and JPEG on blocks of 8 x 8 pixels, so neither scales with the picture.
"""

import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ipx2p.data.light import linear_from_srgb, setting, srgb_from_linear, uniform
from ipx2p.images import image_from_pixels01, pixels01_from_image


@dataclass
class NoiseConfig:
    """Sensor noise: ranges from which each picture draws uniformly."""

    shot: list[float] = setting([0.005, 0.06])  # variance per unit of light
    read: list[float] = setting([0.005, 0.05])  # standard deviation
    quality: list[float] = setting([60.0, 95.0], least=1, most=100, mild_is_high=True)  # of JPEG


@dataclass
class LowLightConfig:
    """Underexposure: ranges from which each picture draws uniformly."""

    stops: list[float] = setting([2.0, 6.0])  # each halves the light
    shot: list[float] = setting([0.0001, 0.0006])
    read: list[float] = setting([0.0003, 0.001])
    cast: float = setting(0.08, most=1)  # red and blue gains differ from green's by up to this


def expose(light: Tensor, shot: float, read: float, generator: torch.Generator) -> Tensor:
    """Light (3, H, W) as a sensor measures it, not clipped: at each site of the Bayer mosaic with
    noise of variance shot * light + read^2, which demosaicing spreads to the pixels between."""
    unit = torch.randn(light.shape, generator=generator).to(light)
    return light + demosaic((shot * light + read**2).sqrt() * unit)


def demosaic(noise: Tensor) -> Tensor:
    """Noise (3, H, W) at the sites of an RGGB mosaic, interpolated bilinearly between them.

    The picture itself is not mosaiced, so that it keeps its detail.
    """
    sites = torch.zeros_like(noise)
    for channel, top, left in ((0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 1, 1)):
        sites[channel, top::2, left::2] = noise[channel, top::2, left::2]
    sites = functional.pad(sites[None], (1, 1, 1, 1), "reflect")[0]  # continues the mosaic
    rows = sites[..., 1:-1] + (sites[..., :-2] + sites[..., 2:]) / 2
    full = rows[:, 1:-1] + (rows[:, :-2] + rows[:, 2:]) / 2
    green = sites[1]  # has twice as many sites, each surrounded by four gaps
    above, below, left, right = green[:-2, 1:-1], green[2:, 1:-1], green[1:-1, :-2], green[1:-1, 2:]
    full[1] = green[1:-1, 1:-1] + (above + below + left + right) / 4
    return full


def sensor_noise(pixels01: Tensor, generator: torch.Generator, config: NoiseConfig) -> Tensor:
    """Shot and read noise (Foi et al. 2008, eq. 3) as it leaves a camera: demosaiced, clipped,
    mapped to sRGB and saved as JPEG."""
    shot, read = uniform(config.shot, generator), uniform(config.read, generator)
    light = expose(linear_from_srgb(pixels01), shot, read, generator)
    quality = round(uniform(config.quality, generator))
    return jpeg(srgb_from_linear(light.clamp(0, 1)), quality)


def low_light(pixels01: Tensor, generator: torch.Generator, config: LowLightConfig) -> Tensor:
    """Too short an exposure: 2^-stops of the light, a colour cast, and the sensor's noise."""
    exposure = 2.0 ** -uniform(config.stops, generator)
    red, blue = (uniform([1 - config.cast, 1 + config.cast], generator) for _ in range(2))
    shot, read = uniform(config.shot, generator), uniform(config.read, generator)
    gains = torch.tensor([red, 1.0, blue], device=pixels01.device).view(3, 1, 1)
    light = linear_from_srgb(pixels01) * exposure * gains
    light = expose(light, shot, read, generator)
    return srgb_from_linear(light.clamp(0, 1))


def jpeg(pixels01: Tensor, quality: int) -> Tensor:
    """A picture (3, H, W) saved as JPEG at a quality of 1 to 100 and read back, on its device.

    Bitwise reproducible only with the same build of Pillow: JPEG decoders may round differently.
    """
    file = io.BytesIO()
    image_from_pixels01(pixels01).save(file, "JPEG", quality=quality)
    return pixels01_from_image(Image.open(file)).to(pixels01.device)
