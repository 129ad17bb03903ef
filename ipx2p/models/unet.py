"""The U-Net of Stable Diffusion, conditioned on a source picture (layer 1).

A contracting path, a middle and an expanding path with skip connections (arXiv:1505.04597). A level
has residual blocks and, where it has attention, transformers that attend to the instruction (latent
diffusion, arXiv:2112.10752). An edit model sees the source picture as four more input channels
(InstructPix2Pix, arXiv:2211.09800, sec. 3.2).

State-dict keys are those of the published `unet/` folders. Shapes: B samples, C feature channels,
h x w latent pixels (1/8 of the picture), any size: an up-sampling goes to the size of its skip.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipx2p.errors import InputError
from ipx2p.models import blocks
from ipx2p.published import PublishedConfig, PublishedNetwork

LATENT_CHANNELS = 4
# By the name of the layer; of its blocks, what `UNet.project_text` makes of the instruction.
AttentionOverrides = Mapping[str, Sequence[blocks.AttentionOverride]]
ProjectedText = Mapping[str, Sequence[blocks.KeysValues]]
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
        channels = "4 (text-to-image) or 8 (edit model), not another kind of model"
        self.expect(where, "in_channels", self.in_channels in (4, 8), channels)
        known = {*self.down_block_types} <= {ATTENTION_BLOCK, PLAIN_BLOCK}
        kinds = f"a list of {ATTENTION_BLOCK} or {PLAIN_BLOCK}"
        self.expect(where, "down_block_types", known, kinds)
        one_each = f"{self.levels} entries, one for each level of block_out_channels"
        for name in ("down_block_types", "num_attention_heads"):
            self.expect(where, name, len(getattr(self, name)) == self.levels, one_each)
        widths = self.block_out_channels
        fits = not any(w % n for w, n in zip(widths, self.num_attention_heads, strict=True))
        self.expect(where, "num_attention_heads", fits, f"divisors of the widths {widths}")


class Context(NamedTuple):
    """What every block is given beside the feature map."""

    time: Tensor  # embedding of the timestep, (B, time_dim)
    text: Tensor | ProjectedText  # states of the instruction, (B, 77, D)
    overrides: AttentionOverrides


def make_resnet(config: UNetConfig, width_in: int, width: int) -> blocks.ResnetBlock:
    """The residual block of every level; its last convolution starts at zero, as in LDM."""
    groups, eps = config.norm_num_groups, config.norm_eps
    block = blocks.ResnetBlock(width_in, width, time_dim=config.time_dim, groups=groups, eps=eps)
    blocks.zeroed(block.conv2)
    return block


class Transformer(nn.Module):
    """Spatial transformer after a residual block (arXiv:2112.10752, sec. 3.3), added to its input.

    Attention overrides call it by its `name`.
    """

    def __init__(self, config: UNetConfig, level: int, name: str) -> None:
        super().__init__()
        self.name = name
        width, heads = config.block_out_channels[level], config.num_attention_heads[level]
        projection = blocks.Linear if config.use_linear_projection else blocks.TokenConv
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        self.proj_in = projection(width, width)
        self.transformer_blocks = nn.ModuleList(
            blocks.TransformerBlock(width, heads, config.cross_attention_dim)
            for _ in range(config.transformer_layers_per_block)
        )
        self.proj_out = blocks.zeroed(projection(width, width))

    def forward(
        self, x: Tensor, text: Tensor | ProjectedText, attention_overrides: AttentionOverrides
    ) -> Tensor:
        """(B, C, h, w) and text (B, 77, D) -> (B, C, h, w)."""
        overrides, size = attention_overrides.get(self.name, ()), x.shape[-2:]
        num_blocks = len(self.transformer_blocks)
        texts = [text] * num_blocks if isinstance(text, Tensor) else text[self.name]
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C), N = h * w
        tokens = self.proj_in(tokens)
        for block, text in zip(self.transformer_blocks, texts, strict=True):
            tokens = block(tokens, text, overrides, size)
        tokens = self.proj_out(tokens)
        return x + tokens.transpose(1, 2).unflatten(2, size)  # (B, N, C) -> (B, C, h, w)


class Level(nn.Module):
    """Residual blocks at one resolution, each with a transformer if the level has attention."""

    def __init__(self, config: UNetConfig, level: int, widths_in: list[int], name: str) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        for index, width_in in enumerate(widths_in):
            self.resnets.append(make_resnet(config, width_in, config.block_out_channels[level]))
            if config.down_block_types[level] == ATTENTION_BLOCK:
                self.attentions.append(Transformer(config, level, f"{name}.{index}"))

    def layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        """Residual block and transformer of this index, (B, C, h, w) -> (B, C', h, w)."""
        x = self.resnets[index](x, context.time)
        return self.attentions[index](x, context.text, context.overrides) if self.attentions else x


class DownBlock(Level):
    """One level of the contracting path: each layer adds a skip connection."""

    def __init__(self, config: UNetConfig, level: int, width_before: int) -> None:
        width = config.block_out_channels[level]
        widths_in = [width_before] + [width] * (config.layers_per_block - 1)
        super().__init__(config, level, widths_in, f"down.{level}")
        is_last = level == config.levels - 1
        samplers = [] if is_last else [blocks.Downsample(width, pad_all=True)]
        self.downsamplers = nn.ModuleList(samplers)

    def forward(self, x: Tensor, skips: list[Tensor], context: Context) -> Tensor:
        """(B, C, h, w) -> (B, C', h / 2, w / 2)."""
        for index in range(len(self.resnets)):
            x = self.layer(index, x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """The bottom of the U: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(make_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(config, -1, "mid")])

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        x = self.resnets[0](x, context.time)
        x = self.attentions[0](x, context.text, context.overrides)
        return self.resnets[1](x, context.time)


class UpBlock(Level):
    """One level of the expanding path: each residual block consumes the latest skip connection."""

    def __init__(self, config: UNetConfig, level: int, below: int, skips: list[int]) -> None:
        width = config.block_out_channels[level]
        widths_in = [below + skips[0], *(width + skip for skip in skips[1:])]
        super().__init__(config, level, widths_in, f"up.{config.levels - 1 - level}")
        self.upsamplers = nn.ModuleList([] if level == 0 else [blocks.Upsample(width)])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        context: Context,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """(B, C, h, w) -> (B, C', 2h, 2w), exactly the size of the next skip connection.

        start, stop: of its layers only those from start up to stop, as in a slice.
        """
        for index in range(len(self.resnets))[start:stop]:
            x = self.layer(index, torch.cat([x, skips.pop()], dim=1), context)
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
        widths, num_layers = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        time_layers = OrderedDict(
            linear_1=nn.Linear(widths[0], config.time_dim),
            act=nn.SiLU(),
            linear_2=nn.Linear(config.time_dim, config.time_dim),
        )
        self.time_embedding = nn.Sequential(time_layers)

        self.down_blocks = nn.ModuleList()
        skip_widths = [widths[0]]
        for level, width in enumerate(widths):
            self.down_blocks.append(DownBlock(config, level, skip_widths[-1]))
            skip_widths += [width] * (num_layers + (level < config.levels - 1))

        self.mid_block = MidBlock(config)

        self.up_blocks = nn.ModuleList()
        width_below = widths[-1]
        for level in reversed(range(config.levels)):
            level_skips = [skip_widths.pop() for _ in range(num_layers + 1)]
            self.up_blocks.append(UpBlock(config, level, width_below, level_skips))
            width_below = widths[level]

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = blocks.zeroed(nn.Conv2d(widths[0], config.out_channels, 3, padding=1))

    @property
    def attention_layers(self) -> list[str]:
        """Names of the layers that take attention overrides, in the order they run."""
        return [transformer.name for transformer in self._transformers()]

    def _transformers(self) -> list[Transformer]:
        return [module for module in self.modules() if isinstance(module, Transformer)]

    def project_text(self, text: Tensor) -> ProjectedText:
        """Keys and values of the instruction (B, 77, D) in every layer, to be given to `forward` in
        its place. They are the same at all steps of an edit."""
        return {
            transformer.name: [b.attn2.keys_values(text) for b in transformer.transformer_blocks]
            for transformer in self._transformers()
        }

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor | ProjectedText,
        source_latents: Tensor | None,
        attention_overrides: AttentionOverrides | None = None,
        deep: list[Tensor] | None = None,
    ) -> Tensor:
        """Predict for one noise level per sample.

        Args:
            latents: noisy scaled latents, (B, 4, h, w), already at unit variance.
            timesteps: training indices 0..999, float, (B,); may be fractional.
            text: states of the instruction, (B, 77, D), or what `project_text` made of them.
            source_latents: unscaled posterior mode of the source, (B, 4, h, w); zeros mean no
                picture; None only for a 4-channel text-to-image model.
            attention_overrides: name of a layer (see `attention_layers`) -> what changes in it, and
                for which samples; the others are unchanged, bit for bit.
            deep: keeps the deep feature, which the last two layers of the expanding path are given
                from below, (B, C, h, w) (DeepCache, arXiv:2312.00858). An empty list gets that of
                this call; if it has that of an earlier one, only the shallow part runs, around it.
        Returns: the prediction (eps, v or x0, as trained), (B, 4, h, w).
        Raises: InputError for a missing source, or one that the network does not take.
        """
        x = latents if source_latents is None else torch.cat([latents, source_latents], dim=1)
        if x.shape[1] != self.config.in_channels:
            raise InputError(
                f"the U-Net has {self.config.in_channels} input channels and was given "
                f"{x.shape[1]}: an edit model needs source_latents, text-to-image takes none"
            )
        time = blocks.timestep_embedding(timesteps, self.config.block_out_channels[0])
        time = self.time_embedding(time.to(x.dtype))
        context = Context(time, text, attention_overrides or {})

        x = self.conv_in(x)
        skips = [x]
        *up_blocks, last = self.up_blocks
        if deep:  # the shallow part: what makes the first two skips, then the layers they go to
            skips.append(self.down_blocks[0].layer(0, x, context))
            [x] = deep
        else:
            for block in self.down_blocks:
                x = block(x, skips, context)
            x = self.mid_block(x, context)
            for block in up_blocks:
                x = block(x, skips, context)
            x = last(x, skips, context, stop=-2)
            if deep is not None:
                deep.append(x)
        x = last(x, skips, context, start=-2)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
