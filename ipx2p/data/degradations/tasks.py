"""Degradations of photographs: pure seeded functions on [0, 1] pixels (layer 2).

A task names what an edit has to undo; several joined by "+" are undone together. Whatever the order
of the names, the picture is degraded in the order of nature: rain is in the scene, the exposure
blurs and darkens it, and the sensor's noise and the file come last.
Everything random is decided by CPU generators, so that no device changes it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from ipx2p.data.degradations.blur import BlurConfig, blur
from ipx2p.data.degradations.rain import RainConfig, rain
from ipx2p.data.degradations.sensor import LowLightConfig, NoiseConfig, low_light, sensor_noise
from ipx2p.errors import InputError, suggestion
from ipx2p.images import RANGE_TOLERANCE

# What a setting must stay below; all are numbers of 0 or more.
BELOW = {
    **{f"rain.{name}": 1 for name in ("length", "opacity", "width")},
    "rain.drops": 20_000,
    "rain.veil": 10,
    "rain.lean": 90,
    "rain.gust": 90,
    **{f"blur.{name}": 1 for name in ("length", "radius", "sigma")},
    "low_light.cast": 1,
    "noise.quality": 101,
}
MIN_SIDE = 8  # pixels; on less there is nothing to see
MILD_IS_HIGH = ("noise.quality",)  # ranges whose high end is the mild one


@dataclass
class DegradeConfig:
    """Severities of all degradations: in ranges [low, high] each picture draws one, uniformly."""

    rain: RainConfig = field(default_factory=RainConfig)
    blur: BlurConfig = field(default_factory=BlurConfig)
    low_light: LowLightConfig = field(default_factory=LowLightConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)

    def check(self, where: str) -> None:
        """Raise InputError for a setting that cannot be, naming the key."""
        for group, settings in asdict(self).items():
            for name, value in settings.items():
                _check_setting(f"{group}.{name}", value, where)
        if self.noise.quality[0] < 1:
            raise InputError(f"{where}.noise.quality is {self.noise.quality}, expected 1 to 100")
        if not self.blur.motion + self.blur.defocus + self.blur.gaussian > 0:
            raise InputError(
                f"{where}.blur: motion, defocus and gaussian are all 0, expected a weight above 0"
            )

    def at(self, severity: float) -> "DegradeConfig":
        """The same with every range narrowed to one point: 0 is its mild end, 1 its severe one."""
        if not 0 <= severity <= 1:
            raise InputError(f"severity is {severity}, expected 0 (mild) to 1 (severe)")
        groups = {}
        for group, settings in asdict(self).items():
            points = {}
            for name, value in settings.items():
                if isinstance(value, list):
                    mild, severe = value[::-1] if f"{group}.{name}" in MILD_IS_HIGH else value
                    points[name] = [mild + (severe - mild) * severity] * 2
            groups[group] = replace(getattr(self, group), **points)
        return DegradeConfig(**groups)


Degradation = Callable[[Tensor, torch.Generator, DegradeConfig], Tensor]
# In the order of nature; the keys are the task names of manifests and configs.
DEGRADATIONS: dict[str, Degradation] = {
    "derain": lambda pixels01, generator, config: rain(pixels01, generator, config.rain),
    "deblur": lambda pixels01, generator, config: blur(pixels01, generator, config.blur),
    "enhance": lambda pixels01, generator, config: low_light(pixels01, generator, config.low_light),
    "denoise": lambda pixels01, generator, config: sensor_noise(pixels01, generator, config.noise),
}


def degrade(
    pixels01: Tensor,
    task: str,
    generator: torch.Generator | Sequence[torch.Generator],
    config: DegradeConfig,
) -> Tensor:
    """The picture as it was before `task` repaired it, float32 in [0, 1], same shape and device.

    Args:
        pixels01: a picture (3, H, W), or a batch (N, 3, H, W).
        task: a key of `DEGRADATIONS`, or several joined by "+".
        generator: on the CPU. For a batch also one for each picture; one alone serves them in turn.

    Raises: InputError for an unknown task, and for pixels that are none.
    """
    names = canonical_task(task, "degrade").split("+")
    _check_pixels(pixels01)
    if "enhance" in names and "denoise" in names:
        config = _at_lower_gain(config)
    if pixels01.ndim == 3:
        return _in_turn(pixels01, names, generator, config)
    count = len(pixels01)
    generators = [generator] * count if isinstance(generator, torch.Generator) else [*generator]
    if len(generators) != count:
        raise InputError(f"degrade: {len(generators)} generators, expected 1 or {count}, one each")
    pairs = zip(pixels01, generators, strict=True)
    return torch.stack([_in_turn(picture, names, draws, config) for picture, draws in pairs])


def check_task(task: str, where: str) -> None:
    """Raise InputError for a task that no degradation belongs to, or that names one twice."""
    known = [*DEGRADATIONS]
    parts = task.split("+")
    of = f" in {task!r}" if len(parts) > 1 else ""
    for part in parts:
        if part not in known:
            raise InputError(f"{where}: no degradation for {part!r}{of}; {suggestion(part, known)}")
        if parts.count(part) > 1:
            raise InputError(f"{where}: {part!r} stands twice{of}, name each task once")


def canonical_task(task: str, where: str = "task") -> str:
    """The same task with its parts in the order of `DEGRADATIONS`; InputError as `check_task`."""
    check_task(task, where)
    return "+".join(sorted(task.split("+"), key=[*DEGRADATIONS].index))


def _in_turn(
    pixels01: Tensor, names: Sequence[str], generator: torch.Generator, config: DegradeConfig
) -> Tensor:
    pixels01 = pixels01.float()
    for name in names:
        pixels01 = DEGRADATIONS[name](pixels01, generator, config)
    return pixels01


def _at_lower_gain(config: DegradeConfig) -> DegradeConfig:
    """Noise for pictures that are dark too, whose brightest light is 2^stops below the sensor's.

    Of the same scarce light a camera makes a noisy picture by a high gain, or a dark one without
    it; gain raises noise and light alike. So the noise is as strong beside the picture as alone.
    """
    gain = 2.0 ** -(sum(config.low_light.stops) / 2)
    noise = config.noise
    shot, read = ([value * gain for value in bounds] for bounds in (noise.shot, noise.read))
    return replace(config, noise=replace(noise, shot=shot, read=read))


def _check_setting(key: str, value: list[float] | float, where: str) -> None:
    low, high = value if isinstance(value, list) and len(value) == 2 else (value, value)
    if isinstance(low, list) or not 0 <= low <= high < math.inf:
        raise InputError(
            f"{where}.{key} is {value}, expected a range [low, high] of numbers that are 0 or more"
        )
    if high >= BELOW.get(key, math.inf):
        raise InputError(f"{where}.{key} is {value}, expected below {BELOW[key]}")


def _check_pixels(pixels01: Tensor) -> None:
    shape = tuple(pixels01.shape)
    ok = len(shape) in (3, 4) and shape[-3] == 3 and shape[0] > 0
    if not ok or not pixels01.is_floating_point():
        dtype = str(pixels01.dtype).removeprefix("torch.")
        raise InputError(f"degrade: expected float pixels01 ([N,] 3, H, W), got {dtype} {shape}")
    if min(shape[-2:]) < MIN_SIDE:
        raise InputError(f"degrade: a picture of {shape[-1]} x {shape[-2]}, the least is 8 x 8")
    low, high = pixels01.min().item(), pixels01.max().item()
    if not -RANGE_TOLERANCE <= low <= high <= 1 + RANGE_TOLERANCE:
        raise InputError(f"degrade: expected pixels01 in [0, 1], got {low:.6g}..{high:.6g}")
