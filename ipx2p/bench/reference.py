"""The same networks in diffusers, on the same weights in memory (layer 5).

The only file that knows diffusers; it is imported for `--against diffusers` alone.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipx2p.editing.editor import Editor
from ipx2p.errors import InputError
from ipx2p.models.unet import UNet

try:
    import diffusers
except ImportError as error:
    raise InputError('diffusers is not installed: pip install -e ".[bench]"') from error


def twin(ours: nn.Module, folder: Path, kind: str) -> Any:
    """A network of diffusers whose parameters are ours, not copies: gradients and updates too."""
    network_type = getattr(diffusers, kind)
    with torch.device("meta"):
        theirs = network_type.from_config(network_type.load_config(folder))
    theirs.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    return theirs.train(ours.training)


class UNetTwin(nn.Module):
    """The U-Net of diffusers, called as ours is."""

    def __init__(self, ours: UNet, folder: Path) -> None:
        super().__init__()
        self.unet = twin(ours, folder, "UNet2DConditionModel")

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, source: Tensor) -> Tensor:
        return self.unet(torch.cat([latents, source], dim=1), timesteps, text).sample


def pipeline(editor: Editor, folder: Path) -> Any:
    """The edit pipeline of diffusers, with the U-Net and the autoencoder of an editor."""
    found = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folder,
        unet=twin(editor.unet, folder / "unet", "UNet2DConditionModel"),
        vae=twin(editor.vae, folder / "vae", "AutoencoderKL"),
        safety_checker=None,
        torch_dtype=editor.dtype,  # of the text encoder
    )
    found.set_progress_bar_config(disable=True)
    return found.to(editor.device)
