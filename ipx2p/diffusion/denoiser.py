"""The contract of sampling, D(x, sigma, step) -> denoised, and a network that meets it (layer 1).

`x` and the result are float32 in units of the clean latents, x = x0 + sigma n (arXiv:2206.00364,
sec. 3). Network, guidance and sampler meet here only, so each can change without the others.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ipx2p.diffusion.schedule import Schedule, Step

Denoiser = Callable[[Tensor, float, Step], Tensor]


def denoise(
    network: Callable[..., Tensor],
    schedule: Schedule,
    x: Tensor,
    sigma: float,
    *,
    text: Any,
    source_latents: Tensor,
    **more: Any,
) -> Tensor:
    """Evaluate the network once and turn its prediction into an estimate of x0.

    x is scaled by 1 / sqrt(1 + sigma^2) to the unit variance that the network was trained on. The
    source latents are a condition without noise and are never scaled.

    Args:
        network: `UNet.forward` or the like.
        x: noisy latents at noise level sigma, (B, 4, h, w), float32.
        text: states of the instruction, (B, 77, D), or what the network takes in their place.
        source_latents: unscaled, (B, 4, h, w), in the network's dtype; zeros for no picture.
        more: what else the network takes, such as attention_overrides.
    Returns: denoised latents, (B, 4, h, w), float32.
    """
    timesteps = torch.full((len(x),), schedule.timestep(sigma), device=x.device)
    scaled = (x / math.sqrt(1 + sigma**2)).to(source_latents.dtype)
    prediction = network(scaled, timesteps, text, source_latents, **more)
    return schedule.denoised(prediction.float(), x, sigma)
