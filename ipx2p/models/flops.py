"""The work of a U-Net in FLOPs, counted and not timed (layer 1).

A multiplication and an addition are two FLOPs. Attention counts too.
"""

import json
from dataclasses import asdict
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ipx2p.models.unet import LATENT_CHANNELS, UNet, UNetConfig


def counted_flops(
    config: UNetConfig, h: int, w: int, *, training: bool = False, shallow: bool = False
) -> float:
    """FLOPs of one sample's forward pass, in `training` also of its backward pass, at h x w
    latents; with `shallow`, of the part that runs around a deep feature."""
    # Slow to import, and most edits count nothing.
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(training):
        unet = UNet(config)
        latents = torch.empty(1, LATENT_CHANNELS, h, w)
        source = latents if config.in_channels == 2 * LATENT_CHANNELS else None
        shown = latents, torch.empty(1), torch.empty(1, 77, config.cross_attention_dim), source
        deep: list[Tensor] = []
        if shallow:
            unet(*shown, deep=deep)
        with FlopCounterMode(display=False) as counter:
            prediction = unet(*shown, deep=deep)
            if training:
                prediction.sum().backward()
    return float(counter.get_total_flops())


def shallow_share(config: UNetConfig, h: int, w: int) -> float:
    """FLOPs of the shallow part at h x w latents, of those of the whole network."""
    return _shallow_share(json.dumps(asdict(config)), h, w)


@lru_cache  # counting takes seconds
def _shallow_share(config: str, h: int, w: int) -> float:
    sizes = UNetConfig(**json.loads(config))
    return counted_flops(sizes, h, w, shallow=True) / counted_flops(sizes, h, w)
