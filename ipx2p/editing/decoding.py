"""Latents of an edit to pixels, with the features of the source or without (layer 3)."""

import torch
from PIL import Image
from torch import Tensor

from ipx2p.devices import dtype_name
from ipx2p.errors import InputError, NotFiniteError
from ipx2p.images import pixels01_from_image, pixels_from_pixels01
from ipx2p.models.vae import VAE
from ipx2p.models.wrapping import FeatureWrapping


@torch.no_grad()
def decode(
    vae: VAE,
    latents: Tensor,
    source: Image.Image,
    wrapping: FeatureWrapping | None = None,
    weight: float = 0.0,
) -> Tensor:
    """Pixels around [-1, 1], (3, H, W), float32, on the CPU; in tiles where memory is short.

    Args:
        latents: of one edit, scaled, (1, 4, h, w).
        source: at the size of the edit.
        weight: w of feature wrapping, 0 to 1; at 0 it is the plain decoder, at no cost.
    Raises: NotFiniteError; InputError for a weight without a wrapping.
    """
    tile, wraps = vae.tile_for(source.height, source.width), []
    if weight:
        check_wrapping(wrapping)
        pixels = pixels_from_pixels01(pixels01_from_image(source))[None]
        features = vae.features(pixels.to(vae.device, vae.dtype), tile)
        wraps = wrapping.wraps(features, weight)
    pixels = vae.decode(latents.to(vae.dtype), tile, wraps)[0].float().cpu()
    if not pixels.isfinite().all():
        raise NotFiniteError(
            f"decoded pixels are not finite, VAE in {dtype_name(vae.dtype)}: use bfloat16 or "
            "float32"
        )
    return pixels


def check_wrapping(wrapping: FeatureWrapping | None) -> None:
    """Raise InputError where there is none."""
    if wrapping is None:
        raise InputError(
            "these weights have no wrapping/, which fidelity wrap needs: train it with "
            "objective.kind=wrapping (configs/tiny_cfw.yaml), or leave wrap out"
        )
