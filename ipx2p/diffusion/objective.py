"""The training objective: random draws, conditioning dropout, loss and its weights (layer 1).

Noise prediction in latent space with two conditions (InstructPix2Pix, arXiv:2211.09800, sec. 3.2).
Every draw belongs to one training sample and is keyed by the run's seed and the sample's index.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipx2p.devices import copy_to
from ipx2p.errors import InputError
from ipx2p.seeds import generator


@dataclass
class DropoutConfig:
    """Shares of samples whose conditions are dropped, to train the branches of guidance."""

    text: float = 0.05  # the instruction alone
    image: float = 0.05  # the source alone
    both: float = 0.05

    def check(self, where: str) -> None:
        """Raise InputError for impossible shares."""
        shares = (self.text, self.image, self.both)
        if not all(share >= 0 for share in shares) or sum(shares) > 1:
            raise InputError(f"{where}: shares {shares} must be 0 or more and sum to at most 1")


@dataclass(frozen=True)
class Draws:
    """The random draws of a batch of B samples."""

    timesteps: Tensor  # (B,), int64, 0..999
    noise: Tensor  # (B, 4, h, w), added to the target
    posterior_noise: Tensor  # (B, 4, h, w), samples the target's latents from their posterior
    dropout: Tensor  # (B,), uniform in [0, 1)

    def to(self, device: torch.device) -> "Draws":
        """The same draws on a device, without waiting for the copy."""
        return Draws(*(copy_to(tensor, device) for tensor in vars(self).values()))


def draw(
    seed: int,
    indices: Sequence[int],
    latent_shape: Sequence[int],
    num_train_timesteps: int,
    timestep_shift: float = 1.0,
) -> Draws:
    """Draw for the samples with these global indices, on the CPU.

    Args:
        latent_shape: (4, h, w) of one sample.
        timestep_shift: s; uniform timesteps t in [0, 1] become s t / (1 + (s - 1) t)
            (arXiv:2403.03206, eq. 23).
    """
    rows = []
    for index in indices:
        draws = generator(seed, "objective", index)
        t = (torch.randint(num_train_timesteps, (), generator=draws) + 0.5) / num_train_timesteps
        t = timestep_shift * t / (1 + (timestep_shift - 1) * t)
        noises = torch.randn(2, *latent_shape, generator=draws)
        timestep = (t * num_train_timesteps).long()
        rows.append((timestep, noises[0], noises[1], torch.rand((), generator=draws)))
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))


def hidden_conditions(uniform: Tensor, dropout: DropoutConfig) -> tuple[Tensor, Tensor]:
    """Masks, (B,), of the samples without their instruction, and of those without their source.

    Args:
        uniform: one number in [0, 1) per sample, (B,), which decides both.
    """
    until_text = dropout.text
    until_both = until_text + dropout.both
    until_image = until_both + dropout.image
    return uniform < until_both, (uniform >= until_text) & (uniform < until_image)


def drop_conditions(
    text: Tensor,
    source_latents: Tensor,
    null_text: Tensor,
    hide_text: Tensor,
    hide_source: Tensor,
) -> tuple[Tensor, Tensor]:
    """Replace hidden instructions by the null text and hidden sources by zeros.

    Args:
        text: (B, 77, D). null_text: (1, 77, D). source_latents: (B, 4, h, w).
        hide_text, hide_source: masks, (B,).
    """
    text = torch.where(hide_text[:, None, None], null_text.to(text.dtype), text)
    return text, source_latents.masked_fill(hide_source[:, None, None, None], 0.0)


def loss_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, float32, (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight of a sample's loss at its signal-to-noise ratio (Min-SNR, arXiv:2303.09556, sec. 3.4).

    In terms of x0 the weight is min(snr, gamma); a loss on eps already contains a factor snr, one
    on v a factor snr + 1.
    """
    factor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / factor[prediction_type]
