"""Degradations of photographs: pure seeded functions on [0, 1] pixels (layer 2).

A task names what an edit has to undo; tasks joined by "+" are undone together. The names may come
in any order; degradations are applied as in nature: rain is in the scene, the exposure blurs and
darkens it, and the sensor's noise and the file come last.
All random numbers come from CPU generators, so results do not depend on the device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ipx2p.data.degradations.blur import BlurConfig, blur
from ipx2p.data.degradations.rain import RainConfig, rain
from ipx2p.data.degradations.sensor import LowLightConfig, NoiseConfig, low_light, sensor_noise
from ipx2p.data.light import check_pixels01
from ipx2p.errors import InputError, suggestion


def _task(name: str, function: Callable[..., Tensor], settings: type) -> Any:
    return field(default_factory=settings, metadata={"task": name, "function": function})


@dataclass
class DegradeConfig:
    """The degradations and their settings, in the order in which nature applies them.

    Each line declares a task: its name in manifests and configs, the function that degrades a
    picture, (pixels01, generator, settings) -> pixels01, and its settings. The instructions are in
    `banks/NAME.txt`.
    """

    rain: RainConfig = _task("derain", rain, RainConfig)
    blur: BlurConfig = _task("deblur", blur, BlurConfig)
    low_light: LowLightConfig = _task("enhance", low_light, LowLightConfig)
    noise: NoiseConfig = _task("denoise", sensor_noise, NoiseConfig)

    def check(self, where: str) -> None:
        """Raise InputError for an invalid setting, naming the key."""
        for group in fields(self):
            settings = getattr(self, group.name)
            for setting in fields(settings):
                key = f"{where}.{group.name}.{setting.name}"
                _check_setting(key, getattr(settings, setting.name), setting)
        if not self.blur.motion + self.blur.defocus + self.blur.gaussian > 0:
            raise InputError(
                f"{where}.blur: motion, defocus and gaussian are all 0, expected a weight above 0"
            )

    def at(self, severity: float) -> "DegradeConfig":
        """The same with every range narrowed to one point: 0 is its mild end, 1 its severe one."""
        if not 0 <= severity <= 1:
            raise InputError(f"severity is {severity}, expected 0 (mild) to 1 (severe)")
        groups = {}
        for group in fields(self):
            settings, points = getattr(self, group.name), {}
            for setting in fields(settings):
                value = getattr(settings, setting.name)
                if isinstance(value, list):
                    mild, severe = value[::-1] if setting.metadata.get("mild_is_high") else value
                    points[setting.name] = [mild + (severe - mild) * severity] * 2
            groups[group.name] = replace(settings, **points)
        return replace(self, **groups)

    def of(self, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The settings that affect these tasks, by group."""
        names = {name for task in tasks for name in task.split("+")}
        groups = [group for name, group in DEGRADATIONS.items() if name in names]
        return {group.name: asdict(getattr(self, group.name)) for group in groups}


DEGRADATIONS: dict[str, Field] = {group.metadata["task"]: group for group in fields(DegradeConfig)}


def degrade(
    pixels01: Tensor,
    task: str,
    generator: torch.Generator | Sequence[torch.Generator],
    config: DegradeConfig,
) -> Tensor:
    """The source picture that `task` has to repair, float32 in [0, 1], same shape and device.

    Args:
        pixels01: a picture (3, H, W), or a batch (N, 3, H, W).
        task: a key of `DEGRADATIONS`, or several joined by "+".
        generator: on the CPU. A batch may have one per picture; a single one serves them in turn.
    Raises: InputError for an unknown task, or for a tensor that is not a picture.
    """
    names = canonical_task(task, "degrade").split("+")
    check_pixels01(pixels01, "degrade")
    height, width = pixels01.shape[-2:]
    if min(height, width) < 8:  # on less there is nothing to see
        raise InputError(f"degrade: a picture of {width} x {height}, expected at least 8 x 8")
    if pixels01.ndim == 4:
        count = len(pixels01)
        generators = [generator] * count if isinstance(generator, torch.Generator) else generator
        if len(generators) != count:
            raise InputError(f"degrade: {len(generators)} generators for {count} pictures")
        pairs = zip(pixels01, generators, strict=True)
        return torch.stack([degrade(picture, task, draws, config) for picture, draws in pairs])
    if "enhance" in names and "denoise" in names:
        config = _at_lower_gain(config)
    for name in names:
        group = DEGRADATIONS[name]
        pixels01 = group.metadata["function"](pixels01, generator, getattr(config, group.name))
    return pixels01


def check_task(task: str, where: str) -> None:
    """Raise InputError for an unknown task, or one that names a degradation twice."""
    known = [*DEGRADATIONS]
    parts = task.split("+")
    of = f" in {task!r}" if len(parts) > 1 else ""
    for part in parts:
        if part not in known:
            raise InputError(f"{where}: no degradation for {part!r}{of}; {suggestion(part, known)}")
        if parts.count(part) > 1:
            raise InputError(f"{where}: {part!r} appears twice{of}, name each task once")


def canonical_task(task: str, where: str = "task") -> str:
    """The same task with its parts in the order of `DEGRADATIONS`; InputError as `check_task`."""
    check_task(task, where)
    return "+".join(sorted(task.split("+"), key=[*DEGRADATIONS].index))


def _at_lower_gain(config: DegradeConfig) -> DegradeConfig:
    """Noise for pictures that are also dark, whose light is 2^stops below the sensor's maximum.

    From the same scarce light a camera makes a noisy picture with high gain, or a dark one without
    it; gain amplifies noise and light alike. So the noise is as strong relative to the picture.
    """
    gain = 2.0 ** -(sum(config.low_light.stops) / 2)
    noise = config.noise
    shot, read = ([value * gain for value in bounds] for bounds in (noise.shot, noise.read))
    return replace(config, noise=replace(noise, shot=shot, read=read))


def _check_setting(key: str, value: list[float] | float, setting: Field) -> None:
    least, most = setting.metadata.get("least", 0), setting.metadata.get("most", math.inf)
    low, high = value if isinstance(value, list) and len(value) == 2 else (value, value)
    if isinstance(low, list) or not least <= low <= high <= most or high == math.inf:
        what = "a range [low, high]" if isinstance(value, list) else "a number"
        raise InputError(f"{key} is {value}, expected {what} within {least:g} to {most:g}")
