"""The U-Net of Stable Diffusion, conditioned on a source picture (layer 1).

A contracting path, a middle and an expanding path with skip connections (arXiv:1505.04597), each
level made of residual blocks and, where the level has attention, transformers that attend to the
instruction (latent diffusion, arXiv:2112.10752). An edit model sees the source picture as four more
input channels (InstructPix2Pix, arXiv:2211.09800, sec. 3.2).

State-dict keys are those of the published `unet/` folders. Shapes: B samples, C feature channels,
h x w latent pixels (1/8 of the picture), any size: an up-sampling goes to the size of its skip.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipx2p.errors import InputError
from ipx2p.models.blocks import (
    AttentionOverride,
    Downsample,
    ResnetBlock,
    Upsample,
    timestep_embedding,
    zeroed,
)
from ipx2p.models.transformer import Transformer
from ipx2p.published import PublishedConfig, PublishedNetwork

LATENT_CHANNELS = 4
AttentionOverrides = Mapping[str, Sequence[AttentionOverride]]  # by the name of the layer
ATTENTION_BLOCK, PLAIN_BLOCK = "CrossAttnDownBlock2D", "DownBlock2D"


@dataclass
class UNetConfig(PublishedConfig):
    """Sizes of a U-Net. Defaults: the edit model of Stable Diffusion 1.x (860 M parameters)."""

    class_name = "UNet2DConditionModel"

    in_channels: int = 8  # 4 for text-to-image, 8 with a source picture
    out_channels: int = LATENT_CHANNELS
    block_out_channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    down_block_types: list[str] = field(
        default_factory=lambda: [ATTENTION_BLOCK, ATTENTION_BLOCK, ATTENTION_BLOCK, PLAIN_BLOCK]
    )
    num_attention_heads: list[int] = field(default_factory=lambda: [8, 8, 8, 8])
    layers_per_block: int = 2
    transformer_layers_per_block: int = 1
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    sample_size: int | None = 64  # latent pixels of the training pictures, a note

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def time_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    def check(self, where: str) -> None:
        super().check(where)
        widths = self.block_out_channels
        if self.in_channels not in (LATENT_CHANNELS, 2 * LATENT_CHANNELS):
            expected = "4 (text-to-image) or 8 (edit model), not another kind of model"
            self.refuse(where, "in_channels", expected)
        if not {*self.down_block_types} <= {ATTENTION_BLOCK, PLAIN_BLOCK}:
            expected = f"a list of {ATTENTION_BLOCK} or {PLAIN_BLOCK}"
            self.refuse(where, "down_block_types", expected)
        for name in ("down_block_types", "num_attention_heads"):
            if len(getattr(self, name)) != self.levels:
                expected = f"{self.levels} entries, one for each level of block_out_channels"
                self.refuse(where, name, expected)
        if any(w % heads for w, heads in zip(widths, self.num_attention_heads, strict=True)):
            self.refuse(where, "num_attention_heads", f"divisors of the widths {widths}")


class TimeEmbedding(nn.Module):
    """A two-layer network on the timestep's sinusoids."""

    def __init__(self, dim: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim) -> (B, time_dim)."""
        return self.linear_2(F.silu(self.linear_1(x)))


def make_resnet(config: UNetConfig, width_in: int, width: int) -> ResnetBlock:
    """The residual block of every level; its last convolution starts at zero, as in LDM."""
    block = ResnetBlock(
        width_in,
        width,
        time_dim=config.time_dim,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
    )
    zeroed(block.conv2)
    return block


def make_transformer(config: UNetConfig, level: int, name: str) -> Transformer:
    """The transformer after a residual block of `level`; attention overrides use its `name`."""
    return Transformer(
        config.block_out_channels[level],
        heads=config.num_attention_heads[level],
        context_dim=config.cross_attention_dim,
        depth=config.transformer_layers_per_block,
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        name=name,
    )


class DownBlock(nn.Module):
    """One level of the contracting path; also returns its skip connections."""

    def __init__(self, config: UNetConfig, level: int, width_before: int, *, last: bool) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for index in range(config.layers_per_block):
            self.resnets.append(make_resnet(config, width if index else width_before, width))
            if config.down_block_types[level] == ATTENTION_BLOCK:
                name = f"down.{level}.{index}"
                self.attentions.append(make_transformer(config, level, name))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width, pad_all=True)])

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, attention_overrides: AttentionOverrides
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, C, h, w) -> (B, C', h / 2, w / 2), and the skip connections."""
        skips = []
        for index, block in enumerate(self.resnets):
            x = block(x, time)
            if self.attentions:
                x = self.attentions[index](x, text, attention_overrides)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """The bottom of the U: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(make_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([make_transformer(config, -1, "mid")])

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, attention_overrides: AttentionOverrides
    ) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, text, attention_overrides)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level of the expanding path: each residual block consumes the latest skip connection."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        width_below: int,
        skip_widths: list[int],
        *,
        last: bool,
    ) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for index, skip_width in enumerate(skip_widths):
            width_in = (width if index else width_below) + skip_width
            self.resnets.append(make_resnet(config, width_in, width))
            if config.down_block_types[level] == ATTENTION_BLOCK:
                name = f"up.{config.levels - 1 - level}.{index}"
                self.attentions.append(make_transformer(config, level, name))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(width)])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: Tensor,
        text: Tensor,
        attention_overrides: AttentionOverrides,
    ) -> Tensor:
        """(B, C, h, w) -> (B, C', 2h, 2w), exactly the size of the next skip connection."""
        for index, block in enumerate(self.resnets):
            x = block(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[index](x, text, attention_overrides)
        for upsample in self.upsamplers:
            x = upsample(x, size=skips[-1].shape[-2:])
        return x


class UNet(PublishedNetwork):
    """Predicts noise (or v) from noisy latents, the timestep, the instruction and the source."""

    config_type = UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        config.check("UNetConfig")
        self.config = config
        widths = config.block_out_channels
        last = config.levels - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], config.time_dim)

        self.down_blocks = nn.ModuleList()
        skip_widths = [widths[0]]
        for level, width in enumerate(widths):
            width_before = skip_widths[-1]
            self.down_blocks.append(DownBlock(config, level, width_before, last=level == last))
            skip_widths += [width] * (config.layers_per_block + (level != last))

        self.mid_block = MidBlock(config)

        self.up_blocks = nn.ModuleList()
        width_below = widths[-1]
        for level in reversed(range(config.levels)):
            skips = [skip_widths.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(config, level, width_below, skips, last=level == 0))
            width_below = widths[level]

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = zeroed(nn.Conv2d(widths[0], config.out_channels, 3, padding=1))

    @property
    def attention_layers(self) -> list[str]:
        """Names of the layers that take attention overrides, in the order they run."""
        return [module.name for module in self.modules() if isinstance(module, Transformer)]

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        source_latents: Tensor | None,
        attention_overrides: AttentionOverrides | None = None,
    ) -> Tensor:
        """Predict for one noise level per sample.

        Args:
            latents: noisy scaled latents, (B, 4, h, w), already at unit variance.
            timesteps: training indices 0..999, float, (B,); may be fractional.
            text: states of the instruction, (B, 77, D).
            source_latents: unscaled posterior mode of the source, (B, 4, h, w); zeros mean no
                picture; None only for a 4-channel text-to-image model.
            attention_overrides: name of a layer (see `attention_layers`) -> what changes in it, and
                for which samples; the others are unchanged, bit for bit.
        Returns: the prediction (eps, v or x0, as trained), (B, 4, h, w).
        Raises: InputError for a missing source, or one that the network does not take.
        """
        x = latents if source_latents is None else torch.cat([latents, source_latents], dim=1)
        if x.shape[1] != self.config.in_channels:
            raise InputError(
                f"the U-Net has {self.config.in_channels} input channels and was given "
                f"{x.shape[1]}: an edit model needs source_latents, text-to-image takes none"
            )
        time = timestep_embedding(timesteps, self.config.block_out_channels[0])
        time = self.time_embedding(time.to(x.dtype))
        x = self.conv_in(x)

        overrides = attention_overrides or {}
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, time, text, overrides)
            skips += block_skips
        x = self.mid_block(x, time, text, overrides)
        for block in self.up_blocks:
            x = block(x, skips, time, text, overrides)

        return self.conv_out(F.silu(self.conv_norm_out(x)))
