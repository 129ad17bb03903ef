"""Controllable feature wrapping: the decoder sees the source picture's features (layer 1).

StableSR (arXiv:2305.07015, sec. 3.3). After the residual blocks of a decoder level,
out = decoded + w C([encoded, decoded]), where `encoded` is what the encoder has of the source at
that resolution, C is trained, and w in [0, 1] is chosen at each edit. Encoder and decoder are
frozen. Levels finer than the latents are wrapped; at the latents' own resolution the edit decides.

Here C is two residual blocks and a convolution that starts at zero, so an untrained one changes
nothing. The paper has two residual-in-residual dense blocks between its residual blocks.
Shapes: B pictures of H x W pixels; level i has C_i channels and H / 2^i x W / 2^i pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipx2p.errors import InputError
from ipx2p.models.blocks import Conv3x3, ResnetBlock, zeroed
from ipx2p.published import PublishedConfig, PublishedNetwork
from ipx2p.tensor_files.tensors import digest

FOLDER = "wrapping"  # in a weights folder, beside the autoencoder that it was trained with


@dataclass
class WrappingConfig(PublishedConfig):
    """The autoencoder that a feature wrapping belongs to: its sizes, and what tells it from others.

    The file is ours; other programs ignore it.
    """

    class_name = "FeatureWrapping"

    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    norm_num_groups: int = 32
    autoencoder: str = ""  # see `fingerprint`

    @classmethod
    def of(cls, vae: nn.Module) -> "WrappingConfig":
        """Of an autoencoder; InputError if no level is finer than its latents."""
        widths, groups = vae.config.block_out_channels, vae.config.norm_num_groups
        config = cls([*widths], groups, fingerprint(vae))
        config.check("the autoencoder")
        return config

    def check(self, where: str) -> None:
        super().check(where)
        several = len(self.block_out_channels) > 1
        self.expect(where, "block_out_channels", several, "two levels or more")


def fingerprint(vae: nn.Module) -> str:
    """Tells autoencoders apart by their first and last weights, in any dtype that holds them."""
    ends = {"in": vae.encoder.conv_in, "out": vae.decoder.conv_out}
    return digest({name: conv.weight.float() for name, conv in ends.items()})


class WrapBlock(nn.Module):
    """C of one level."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, width, time_dim=None, groups=groups, eps=1e-6)
            for channels in (2 * width, width)
        )
        self.conv_out = zeroed(Conv3x3(width, width))

    def forward(self, encoded: Tensor, decoded: Tensor) -> Tensor:
        """Twice (B, C, H, W) -> what w multiplies, (B, C, H, W)."""
        x = torch.cat([encoded, decoded], dim=1)
        for resnet in self.resnets:
            x = resnet(x)
        return self.conv_out(x)


@dataclass(frozen=True, eq=False)
class WrapLayer:
    """A layer of the decoder: one level, with the features of a picture and w.

    encoded: (B, C, H, W), or a map of `tiling.py`.
    """

    block: WrapBlock
    encoded: Any
    weight: float

    def __call__(self, decoded: Tensor) -> Tensor:
        return decoded + self.weight * self.block(self.encoded, decoded)


class FeatureWrapping(PublishedNetwork):
    """C of every level that is finer than the latents, the finest first."""

    config_type = WrappingConfig

    def __init__(self, config: WrappingConfig) -> None:
        super().__init__()
        self.config = config
        widths, groups = config.block_out_channels[:-1], config.norm_num_groups
        self.blocks = nn.ModuleList(WrapBlock(width, groups) for width in widths)

    @classmethod
    def find(
        cls, folder: Path, vae: nn.Module, dtype: torch.dtype | None = torch.float32
    ) -> "FeatureWrapping | None":
        """That of a weights folder, on the CPU, if it has one.

        Raises: InputError unless it was trained with the autoencoder.
        """
        place = folder / FOLDER
        if not place.is_dir():
            return None
        wrapping = cls.load(place, dtype)
        if wrapping.config != WrappingConfig.of(vae):
            raise InputError(
                f"{place} was trained with another autoencoder than that of {folder}: train one "
                "for it (configs/tiny_cfw.yaml shows how), or remove the folder"
            )
        return wrapping

    def wraps(self, features: Sequence[Any], weight: float) -> list[WrapLayer]:
        """Layers for the decoder, the finest first, from `VAE.features` of the source."""
        return [WrapLayer(b, x, weight) for b, x in zip(self.blocks, features, strict=True)]

    def forward(self, vae: nn.Module, latents: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Decode with w = 1, for training; scaled latents (B, 4, h, w) -> pixels (B, 3, H, W)."""
        return vae.decode(latents, wraps=self.wraps(features, 1.0))
