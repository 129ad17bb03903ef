"""The weights folder: the one format on disk, read and written whole (layer 2).

It is the layout of published repositories: `model_index.json`, `unet/`, `vae/`, `text_encoder/`,
`tokenizer/`, `scheduler/`, each with its config and safetensors. What is written here opens in
diffusers as it is. Two things are ours, and other programs ignore them: `edit_settings.json`, how
the model is used where nothing else is said, see `FolderSettings`; and `wrapping/`, if feature
wrapping was trained for the autoencoder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ipx2p.diffusion.schedule import ScheduleConfig
from ipx2p.files import read_json, write_json
from ipx2p.models.text import TextEncoder
from ipx2p.models.unet import LATENT_CHANNELS, UNet
from ipx2p.models.vae import VAE
from ipx2p.models.wrapping import FOLDER as WRAPPING
from ipx2p.models.wrapping import FeatureWrapping
from ipx2p.weights.readers import EDIT_SETTINGS

NOT_THERE = [None, None]  # a missing part in model_index.json


@dataclass
class Weights:
    """The parts of a model; None for those that training lacks or has already saved."""

    unet: UNet | None
    vae: VAE | None
    text: TextEncoder | None
    schedule: ScheduleConfig
    edit_settings: dict[str, Any] | None = None  # as in the file, unchecked
    wrapping: FeatureWrapping | None = None  # of the autoencoder

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype | None = None, *, tokenizer: Path | None = None
    ) -> "Weights":
        """Read a folder; InputError names what is wrong.

        Args:
            dtype: of all weights; None keeps what the files have.
            tokenizer: folder with the tokenizer's files, instead of that in the folder.
        """
        path = folder / EDIT_SETTINGS
        vae = VAE.load(folder / "vae", dtype)
        return cls(
            unet=UNet.load(folder / "unet", dtype),
            vae=vae,
            text=TextEncoder.load(folder, dtype, tokenizer=tokenizer),
            schedule=ScheduleConfig.load(folder),
            edit_settings=read_json(path) if path.exists() else None,
            wrapping=FeatureWrapping.find(folder, vae, dtype),
        )

    def save(self, folder: Path) -> None:
        """Write the parts; all of them are a folder that diffusers and `Editor.load` open."""
        if self.vae is not None:
            self.vae.save(folder / "vae")
        if self.wrapping is not None:
            self.wrapping.save(folder / WRAPPING)
        if self.text is not None:
            self.text.save(folder)
        self.schedule.save(folder)
        if self.edit_settings is not None:
            write_json(self.edit_settings, folder / EDIT_SETTINGS)
        if self.unet is not None:
            self.unet.save(folder / "unet")
            write_json(model_index(self.unet.config.in_channels), folder / "model_index.json")


def model_index(in_channels: int) -> dict:
    """The model_index.json of a text-to-image (4) or an edit model (8)."""
    is_edit_model = in_channels == 2 * LATENT_CHANNELS
    pipeline = "StableDiffusion" + ("InstructPix2Pix" if is_edit_model else "") + "Pipeline"
    return {
        "_class_name": pipeline,
        "_diffusers_version": "0.30.0",
        "feature_extractor": NOT_THERE,
        "image_encoder": NOT_THERE,
        "requires_safety_checker": False,
        "safety_checker": NOT_THERE,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
