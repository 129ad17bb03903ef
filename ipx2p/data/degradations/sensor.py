"""What a camera's sensor does to the light: noise, too short an exposure, and the file (layer 2).

Noise belongs to pixels and JPEG to blocks of 8 x 8 of them, so neither scales with the picture.
"""

import io
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ipx2p.data.light import linear_from_srgb, srgb_from_linear, uniform
from ipx2p.images import image_from_pixels01, pixels01_from_image


@dataclass
class NoiseConfig:
    """Sensor noise: ranges from which each picture draws, uniformly."""

    shot: list[float] = field(default_factory=lambda: [0.005, 0.03])  # variance per unit of light
    read: list[float] = field(default_factory=lambda: [0.005, 0.03])  # standard deviation
    quality: list[float] = field(default_factory=lambda: [60.0, 95.0])  # of the JPEG; low is severe


@dataclass
class LowLightConfig:
    """Under-exposure: ranges from which each picture draws, uniformly."""

    stops: list[float] = field(default_factory=lambda: [2.0, 4.0])  # halvings of the light
    shot: list[float] = field(default_factory=lambda: [0.0002, 0.001])
    read: list[float] = field(default_factory=lambda: [0.0005, 0.002])
    cast: float = 0.08  # gains of red and blue differ from green's by up to this share


def expose(light: Tensor, shot: float, read: float, generator: torch.Generator) -> Tensor:
    """Light as a sensor counts it: with noise of variance shot * light + read^2, not clipped."""
    unit = torch.randn(light.shape, generator=generator).to(light)
    return light + (shot * light + read**2).sqrt() * unit


def sensor_noise(pixels01: Tensor, generator: torch.Generator, config: NoiseConfig) -> Tensor:
    """Photon and read-out noise (Foi et al. 2008, eq. 3) as it comes out of a camera: clipped, bent
    by the sRGB curve, saved as JPEG."""
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
    """A picture (3, H, W) as a JPEG file of this quality (1 to 100) has it, on the same device.

    Bit for bit the same only with the same build of Pillow: decoders may round differently.
    """
    file = io.BytesIO()
    image_from_pixels01(pixels01).save(file, "JPEG", quality=quality)
    return pixels01_from_image(Image.open(file)).to(pixels01.device)
