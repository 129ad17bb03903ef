"""The autoencoder of Stable Diffusion: pictures to latents and back (layer 1).

A convolutional variational autoencoder (latent diffusion, arXiv:2112.10752, sec. 3.1). This is the
only file that knows the latent scale: `source_latents` are unscaled, `latents` are scaled.

State-dict keys are those of the published `vae/` folders. Shapes: B pictures of H x W pixels,
latents of h x w, H = h * downscale (8 for Stable Diffusion).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipx2p.devices import free_memory
from ipx2p.errors import InputError
from ipx2p.models.blocks import Attention, Downsample, ResnetBlock, Upsample
from ipx2p.models.tiling import FeatureMap, features_in_tiles, in_tiles
from ipx2p.models.wrapping import WrapLayer
from ipx2p.published import PublishedConfig, PublishedNetwork

NORM_EPS = 1e-6  # everywhere in the autoencoder; the U-Net's residual blocks have 1e-5
TILE = 512  # side in pixels, of pictures that do not fit as a whole
# Names of the attention layers in weights published before 2023-05.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class VAEConfig(PublishedConfig):
    """Sizes of an autoencoder. Defaults: Stable Diffusion's (84 M parameters)."""

    class_name = "AutoencoderKL"

    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # brings latents to unit variance

    @property
    def downscale(self) -> int:
        """Pixels of the picture along one latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scale(self, unscaled: Tensor) -> Tensor:
        """Unscaled latents, as the posterior gives them -> the scaled ones that are denoised."""
        return unscaled * self.scaling_factor


class Posterior:
    """The encoder's Gaussian over latents, unscaled.

    Attributes: mean, logvar, (B, 4, h, w).
    """

    def __init__(self, moments: Tensor) -> None:
        mean, logvar = moments.chunk(2, dim=1)
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        """The most likely latents: what an edit model sees of the source picture."""
        return self.mean

    def sample(
        self, generator: torch.Generator | None = None, *, noise: Tensor | None = None
    ) -> Tensor:
        """Draw latents: from a generator on any device, or from given unit noise."""
        if (generator is None) == (noise is None):
            raise InputError("give a generator or noise to sample from, not both or neither")
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Divergence from the unit Gaussian in nats, summed over the latents, (B,)."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


def make_resnets(widths: list[int], groups: int) -> nn.ModuleList:
    """Residual blocks in a row, from width to width; they have no time embedding."""
    return nn.ModuleList(
        ResnetBlock(width_in, width, time_dim=None, groups=groups, eps=NORM_EPS)
        for width_in, width in pairwise(widths)
    )


class SelfAttention(Attention):
    """One head over all pixels of a feature map, added back to it."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__(width, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, width, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)
        tokens = super().forward(tokens)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[-2:])  # (B, N, C) -> (B, C, H, W)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = make_resnets([width] * 3, groups)
        self.attentions = nn.ModuleList([SelfAttention(width, groups)])

    def layers(self) -> list[nn.Module]:
        """In their order."""
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


class Level(nn.Module):
    """Residual blocks, then half or twice the resolution unless it is the last level."""

    def __init__(self, widths: list[int], groups: int, *, down: bool, last: bool) -> None:
        super().__init__()
        self.resnets = make_resnets(widths, groups)
        if down:
            samplers = [] if last else [Downsample(widths[-1], pad_all=False)]
            self.downsamplers = nn.ModuleList(samplers)
        else:
            self.upsamplers = nn.ModuleList([] if last else [Upsample(widths[-1])])

    def layers(self, *wraps: WrapLayer) -> list[nn.Module | WrapLayer]:
        """(B, C, H, W) -> (B, C', H / 2, W / 2) or (B, C', 2H, 2W); H x W at the last level.

        `wraps` come before the resolution changes.
        """
        resnets, samplers = self.children()
        return [*resnets, *wraps, *samplers]


class Chain(nn.Module):
    """Layers one after another, then a normalised 3x3 convolution."""

    def forward(self, x: Tensor, *wraps: WrapLayer) -> Tensor:
        for layer in self.layers(*wraps):
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Encoder(Chain):
    """Pictures to the moments of their latents: (B, 3, H, W) -> (B, 8, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            path = [widths[max(level - 1, 0)]] + [width] * config.layers_per_block
            self.down_blocks.append(Level(path, groups, down=True, last=level == len(widths) - 1))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def layers(self) -> list[nn.Module]:
        """In their order, but for `conv_norm_out` and `conv_out`."""
        blocks = [*self.down_blocks, self.mid_block]
        return [self.conv_in, *(layer for block in blocks for layer in block.layers())]

    def features(self, pixels: Tensor) -> list[Tensor]:
        """What each level but the last has before it is halved, (B, C, H / 2^i, W / 2^i)."""
        x, found = self.conv_in(pixels), []
        for level in self.down_blocks[:-1]:
            *resnets, halve = level.layers()
            for resnet in resnets:
                x = resnet(x)
            found.append(x)
            x = halve(x)
        return found


class Decoder(Chain):
    """Unscaled latents to pictures: (B, 4, h, w) -> (B, 3, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            # One residual block more than the encoder has.
            path = [widths[max(level - 1, 0)]] + [width] * (config.layers_per_block + 1)
            self.up_blocks.append(Level(path, groups, down=False, last=level == len(widths) - 1))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def layers(self, *wraps: WrapLayer) -> list[nn.Module | WrapLayer]:
        """In their order, but for `conv_norm_out` and `conv_out`.

        `wraps`: of all levels but the first, the finest level first; or none.
        """
        finest_first = zip(reversed(self.up_blocks), wraps, strict=False)
        wraps_of = {level: [wrap] for level, wrap in finest_first}
        layers = [self.conv_in, *self.mid_block.layers()]
        for level in self.up_blocks:
            layers += level.layers(*wraps_of.get(level, []))
        return layers


class VAE(PublishedNetwork):
    """Encoder, decoder and the scale of the latents between them."""

    config_type = VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        config.check("VAEConfig")
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, pixels: Tensor, tile: int | None = None) -> Posterior:
        """Pixels in [-1, 1], (B, 3, H, W), sides divisible by the downscale -> unscaled posterior.

        Args:
            tile: side in pixels of the tiles in which a large picture is computed, without
                gradients and through files in the temporary folder; the result is the same but for
                rounding. None: the picture as a whole.
        Raises: InputError for sides or a tile that are not divisible.
        """
        height, width = pixels.shape[-2:]
        multiple = self.config.downscale
        if height % multiple or width % multiple:
            raise InputError(
                f"a picture of {width} x {height} cannot be encoded: resize its sides to "
                f"multiples of {multiple}"
            )
        if tile is None:
            return Posterior(self.quant_conv(self.encoder(pixels)))
        self._check_tile(tile)
        with torch.no_grad():
            return Posterior(self.quant_conv(in_tiles(self.encoder, pixels, tile)))

    def features(self, pixels: Tensor, tile: int | None = None) -> list[Tensor] | list[FeatureMap]:
        """What feature wrapping takes of a source: of each level but the last, the finest first.

        `tile` and errors are those of `encode`; in tiles, of one picture.
        """
        if tile is None:
            return self.encoder.features(pixels)
        self._check_tile(tile)
        return features_in_tiles(self.encoder, pixels, tile)

    def decode(
        self, latents: Tensor, tile: int | None = None, wraps: Sequence[WrapLayer] = ()
    ) -> Tensor:
        """Scaled latents (B, 4, h, w) -> pixels around [-1, 1], (B, 3, H, W), not clamped.

        `tile`, in pixels, and errors are those of `encode`. wraps: of `FeatureWrapping.wraps`, with
        features in tiles if there is a tile, which are used up.
        """
        unscaled = latents / self.config.scaling_factor
        if tile is None:
            return self.decoder(self.post_quant_conv(unscaled), *wraps)
        self._check_tile(tile)
        with torch.no_grad():
            side = tile // self.config.downscale
            return in_tiles(self.decoder, self.post_quant_conv(unscaled), side, *wraps)

    def tile_for(self, height: int, width: int, batch: int = 1) -> int | None:
        """The tile for pictures of a size on this machine; None where they fit as a whole.

        At its peak, where the map has the picture's size and the second level's width, a whole
        picture takes up to four such maps (docs/performance.md); a fifth is for what else runs. A
        picture no larger than a tile gains nothing, and where free memory is unknown, none is
        assumed to be short.
        """
        channels = max(self.config.block_out_channels[:2])
        whole_bytes = 5 * channels * batch * height * width * self.dtype.itemsize
        free_bytes = free_memory(self.device)
        fits = whole_bytes <= free_bytes or not free_bytes
        return None if fits or batch * height * width <= TILE**2 else TILE

    def _check_tile(self, tile: int) -> None:
        multiple = self.config.downscale
        if type(tile) is not int or tile <= 0 or tile % multiple:
            raise InputError(
                f"tile is {tile!r}: expected a multiple of {multiple} pixels, for instance "
                f"{64 * multiple}"
            )

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """A round trip through sampled latents, for training: decoded pixels and the posterior."""
        posterior = self.encode(pixels)
        return self.decode(self.scale(posterior.sample(noise=noise))), posterior

    def scale(self, unscaled: Tensor) -> Tensor:
        return self.config.scale(unscaled)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    @staticmethod
    def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with the old names of the attention layers replaced by the current ones."""

        def rename(key: str) -> str:
            prefix, marker, rest = key.partition(".attentions.0.")
            layer, dot, leaf = rest.rpartition(".")
            return f"{prefix}{marker}{OLD_ATTENTION_NAMES.get(layer, layer)}{dot}{leaf}"

        return {rename(key) if ".attentions.0." in key else key: t for key, t in tensors.items()}
