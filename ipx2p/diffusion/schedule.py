"""Noise levels: the training schedule and the plan of a sampling run (layer 1).

The training schedule is variance preserving, x_t = alpha x0 + s n with alpha^2 + s^2 = 1 (DDPM,
arXiv:2006.11239). Sampling works in units of the clean latents, x = x0 + sigma n with
sigma = s / alpha (arXiv:2206.00364). Everything is computed in float64 and converted on use.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ipx2p.errors import InputError, suggestion
from ipx2p.published import PublishedConfig

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # published names of eps, v, x0
BETA_SCHEDULES = ("scaled_linear", "linear")
FILE = Path("scheduler", "scheduler_config.json")  # in a weights folder

TERMINAL_ALPHA_BAR = 2.0**-24  # zero-terminal SNR, floored so that sigma stays finite (4096)


@dataclass
class ScheduleConfig(PublishedConfig):
    """The training schedule. Defaults: Stable Diffusion's. Fields as in scheduler_config.json."""

    class_name = "EulerDiscreteScheduler"

    num_train_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    steps_offset: int = 1  # of the leading spacing

    @classmethod
    def load(cls, folder: Path) -> "ScheduleConfig":
        """The schedule of a weights folder."""
        return cls.read(folder / FILE)

    def save(self, folder: Path) -> None:
        """Write the schedule into a weights folder."""
        self.write(folder / FILE)

    def write(self, path: Path) -> None:
        # The last timestep, which the rescaling needs, is not visited by the leading spacing.
        spacing = "trailing" if self.rescale_betas_zero_snr else "linspace"
        self.others = {"timestep_spacing": spacing, **self.others}
        super().write(path)

    def check(self, where: str) -> None:
        super().check(where)
        choices = {"prediction_type": PREDICTION_TYPES, "beta_schedule": BETA_SCHEDULES}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"{where}: {name} is {value!r}; {suggestion(str(value), known)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise InputError(
                f"{where}: beta_start {self.beta_start} and beta_end {self.beta_end} must lie "
                "between 0 and 1, in this order"
            )


@dataclass(frozen=True)
class Step:
    """One step of a sampler.

    index, count: position in the run. sigma, sigma_next: noise levels at its start and end.
    sigma_down: where its deterministic part ends, if the sampler adds fresh noise (else
        sigma_next).
    """

    index: int
    count: int
    sigma: float
    sigma_next: float
    sigma_down: float


@dataclass(frozen=True)
class Plan:
    """The noise levels of a run: `sigmas` (count + 1, falling; the last is where it ends).

    `timesteps` are for display; the network gets `Schedule.timestep(sigma)`. Steps that were
    skipped still count: a step is called the same, wherever a run starts.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]  # of the first `count` sigmas
    start_factor: float | None  # x starts at unit noise times this; None: see `from_source`
    ancestral: bool  # steps end in fresh noise
    skipped: int = 0  # steps before the first

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[Step]:
        """The steps in order."""
        for index, (sigma, sigma_next) in enumerate(pairwise(self.sigmas), self.skipped):
            # Fresh noise of variance sigma_next^2 - sigma_down^2 makes up for the rest.
            sigma_down = sigma_next**2 / sigma if self.ancestral else sigma_next
            yield Step(index, self.skipped + len(self), sigma, sigma_next, sigma_down)

    def from_source(self, strength: float) -> "Plan":
        """The last of these steps, for a run that starts at x = source + sigmas[0] n.

        SDEdit (arXiv:2108.01073, alg. 1): the less noise, the more of the source stays.

        Args:
            strength: the share of the steps that is left, in 0..1; their number is rounded to
                nearest, and is at least 1. At 1 nothing changes: x starts at pure noise.
        """
        if strength == 1:
            return self
        skipped = len(self) - max(1, round(strength * len(self)))
        sigmas, timesteps = self.sigmas[skipped:], self.timesteps[skipped:]
        return Plan(sigmas, timesteps, None, self.ancestral, self.skipped + skipped)

    @property
    def end_factor(self) -> float:
        """x times this gives the latents: 1 unless the plan ends before sigma 0."""
        return 1 / math.sqrt(1 + self.sigmas[-1] ** 2)


class Schedule:
    """The training schedule: timesteps and sigmas, adding noise, converting predictions."""

    def __init__(self, config: ScheduleConfig | None = None) -> None:
        self.config = config or ScheduleConfig()
        self.config.check("ScheduleConfig")
        self.alphas_cumprod = _alphas_cumprod(self.config)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        if not self.log_sigmas.isfinite().all() or not (self.log_sigmas.diff() > 0).all():
            raise InputError(
                f"ScheduleConfig: beta_start {self.config.beta_start} and beta_end "
                f"{self.config.beta_end} give noise levels that are not finite and rising"
            )

    @cached_property
    def log_sigmas(self) -> Tensor:
        """Logarithms of the sigmas of all training timesteps, rising, float64."""
        return 0.5 * ((1 - self.alphas_cumprod).log() - self.alphas_cumprod.log())

    @property
    def last_timestep(self) -> int:
        return self.config.num_train_timesteps - 1

    def sigma(self, timestep: float) -> float:
        """Noise level at a timestep, 0..999; log-linear between timesteps, as in k-diffusion."""
        low = min(int(timestep), self.last_timestep - 1)
        weight = timestep - low
        between = (1 - weight) * self.log_sigmas[low] + weight * self.log_sigmas[low + 1]
        return between.exp().item()

    def timestep(self, sigma: float) -> float:
        """Timestep of a noise level, fractional: the inverse of `sigma`, clamped to 0..999."""
        log_sigma = math.log(sigma)
        low = int(torch.searchsorted(self.log_sigmas, log_sigma, right=True)) - 1
        low = min(max(low, 0), self.last_timestep - 1)
        below, above = self.log_sigmas[low].item(), self.log_sigmas[low + 1].item()
        return min(max(low + (log_sigma - below) / (above - below), 0.0), float(self.last_timestep))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha x0 + s n at whole timesteps (B,); float32, unit variance."""
        alpha, s = self._alpha_and_s(timesteps, latents.device)
        return alpha * latents.float() + s * noise.float()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network learns to predict: eps, v = alpha n - s x0, or x0; float32."""
        if self.config.prediction_type == "epsilon":
            return noise.float()
        if self.config.prediction_type == "sample":
            return latents.float()
        # Progressive distillation, arXiv:2202.00512, app. D
        alpha, s = self._alpha_and_s(timesteps, latents.device)
        return alpha * noise.float() - s * latents.float()

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / s^2 at whole timesteps (B,), float32."""
        alpha, s = self._alpha_and_s(timesteps, timesteps.device)
        return (alpha / s).square().flatten()

    def denoised(self, prediction: Tensor, x: Tensor, sigma: float) -> Tensor:
        """The estimate of x0 from a prediction at x = x0 + sigma n, all in float32."""
        if self.config.prediction_type == "epsilon":
            return x - sigma * prediction
        if self.config.prediction_type == "sample":
            return prediction
        # v = alpha n - s x0, with alpha = 1 / sqrt(1 + sigma^2) and s = sigma alpha
        return x / (1 + sigma**2) - prediction * (sigma / math.sqrt(1 + sigma**2))

    def _alpha_and_s(self, timesteps: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:  # once per device, so that training does not wait for copies
            alpha, s = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
            self._tables[device] = alpha.float().to(device), s.float().to(device)
        return tuple(table[timesteps].view(-1, 1, 1, 1) for table in self._tables[device])


def _alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """alpha-bar of every timestep (DDPM, arXiv:2006.11239, eq. 4), falling, float64."""
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
    else:
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    alphas_cumprod = (1 - betas).cumprod(0)
    if config.rescale_betas_zero_snr:
        # Shift and scale alpha so that the last one is 0 and the first is kept
        # (arXiv:2305.08891, alg. 1); the floor keeps sigma finite.
        alpha = alphas_cumprod.sqrt()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        alphas_cumprod = alpha.square()
        alphas_cumprod[-1] = TERMINAL_ALPHA_BAR
    return alphas_cumprod
