"""Degradations of photographs: pure seeded functions on [0, 1] pixels (layer 2).

Light adds up in linear light, not in the sRGB values of a file, so noise and exposure act there.
Each function takes one picture (3, H, W) or a batch (N, 3, H, W), on any device, and a CPU
generator that decides everything random about it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ipx2p.errors import InputError, suggestion


@dataclass
class NoiseConfig:
    """Sensor noise: ranges from which each picture draws, uniformly."""

    shot: list[float] = field(default_factory=lambda: [0.005, 0.03])  # variance per unit of light
    read: list[float] = field(default_factory=lambda: [0.005, 0.03])  # standard deviation


@dataclass
class LowLightConfig:
    """Under-exposure: ranges from which each picture draws, uniformly."""

    stops: list[float] = field(default_factory=lambda: [2.0, 4.0])  # halvings of the light
    shot: list[float] = field(default_factory=lambda: [0.0002, 0.001])
    read: list[float] = field(default_factory=lambda: [0.0005, 0.002])
    cast: float = 0.08  # gains of red and blue differ from green's by up to this share


@dataclass
class DegradeConfig:
    """Severities of all degradations."""

    noise: NoiseConfig = field(default_factory=NoiseConfig)
    low_light: LowLightConfig = field(default_factory=LowLightConfig)

    def check(self, where: str) -> None:
        """Raise InputError for a range that is none, naming the key."""
        for group in ("noise", "low_light"):
            for name, value in vars(getattr(self, group)).items():
                low, high = value if isinstance(value, list) and len(value) == 2 else (value, value)
                if isinstance(low, list) or not 0 <= low <= high < math.inf:
                    raise InputError(
                        f"{where}.{group}.{name} is {value}, expected a range [low, high] of "
                        "numbers that are 0 or more"
                    )
        if self.low_light.cast >= 1:
            raise InputError(f"{where}.low_light.cast is {self.low_light.cast}, expected below 1")


def sensor_noise(pixels01: Tensor, generator: torch.Generator, config: NoiseConfig) -> Tensor:
    """Photon and read-out noise: variance shot * light + read^2 (Foi et al. 2008, eq. 3)."""
    shot, read = _uniform(config.shot, generator), _uniform(config.read, generator)
    light = _expose(linear_from_srgb(pixels01), shot, read, generator)
    return srgb_from_linear(light.clamp(0, 1))


def low_light(pixels01: Tensor, generator: torch.Generator, config: LowLightConfig) -> Tensor:
    """Too short an exposure: 2^-stops of the light, a colour cast, and the sensor's noise."""
    exposure = 2.0 ** -_uniform(config.stops, generator)
    red, blue = (_uniform([1 - config.cast, 1 + config.cast], generator) for _ in range(2))
    shot, read = _uniform(config.shot, generator), _uniform(config.read, generator)
    gains = torch.tensor([red, 1.0, blue], device=pixels01.device).view(3, 1, 1)
    light = linear_from_srgb(pixels01) * exposure * gains
    light = _expose(light, shot, read, generator)
    return srgb_from_linear(light.clamp(0, 1))


# What each task has to undo; the keys are the task names of manifests and configs.
DEGRADATIONS: dict[str, Callable[[Tensor, torch.Generator, DegradeConfig], Tensor]] = {
    "denoise": lambda pixels01, generator, config: sensor_noise(pixels01, generator, config.noise),
    "enhance": lambda pixels01, generator, config: low_light(pixels01, generator, config.low_light),
}


def degrade(
    pixels01: Tensor, task: str, generator: torch.Generator, config: DegradeConfig
) -> Tensor:
    """The picture as it was before `task` repaired it, same shape, in [0, 1]."""
    return DEGRADATIONS[task](pixels01, generator, config)


def check_task(task: str, where: str) -> None:
    """Raise InputError for a task that no degradation belongs to."""
    if task not in DEGRADATIONS:
        known = [*DEGRADATIONS]
        raise InputError(f"{where}: no degradation for {task!r}; {suggestion(task, known)}")


def linear_from_srgb(pixels01: Tensor) -> Tensor:
    """sRGB values to linear light (IEC 61966-2-1), [0, 1] to [0, 1]."""
    bent = ((pixels01 + 0.055) / 1.055).clamp(min=0).pow(2.4)
    return torch.where(pixels01 <= 0.04045, pixels01 / 12.92, bent)


def srgb_from_linear(light: Tensor) -> Tensor:
    """Linear light to sRGB values (IEC 61966-2-1), [0, 1] to [0, 1]."""
    bent = 1.055 * light.clamp(min=0.0031308).pow(1 / 2.4) - 0.055
    return torch.where(light <= 0.0031308, light * 12.92, bent)


def _expose(light: Tensor, shot: float, read: float, generator: torch.Generator) -> Tensor:
    unit = torch.randn(light.shape, generator=generator).to(light)
    return light + (shot * light + read**2).sqrt() * unit


def _uniform(bounds: list[float], generator: torch.Generator) -> float:
    low, high = bounds
    return low + (high - low) * torch.rand((), generator=generator).item()
