"""Weights from which the small base model trains quickly.

    python assets/recipes/starts.py autoencoder PHOTOS BASE OUTPUT --held-out castle.jpg ...
    python assets/recipes/starts.py edit BASE OUTPUT

`autoencoder` writes BASE with an autoencoder that computes the best overlapping linear transform of
the photographs (4 numbers for 2 x 2 pixels). `edit` writes BASE with a U-Net whose prediction of x0
is the source picture. In both, residual branches add nothing at first, and the features before a
last normalization come in pairs (x, -x), for silu(x) - silu(-x) = x, beside two large constants of
opposite sign in their group, which make the scale of the normalization independent of the picture.
"""

import argparse
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipx2p.data.pairs import random_geometry
from ipx2p.images import load_image
from ipx2p.models.blocks import ResnetBlock
from ipx2p.models.unet import UNet, UNetConfig
from ipx2p.models.vae import VAE, SelfAttention, VAEConfig

FEATURES = 8  # at full resolution, of the linear decoder: one for each group of the last norm
CONSTANT = 20.0  # relative to the features beside it
LOG_VARIANCE = -8.0  # of the latents
VAE_SIZES = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8}
UNET_SIZES = {
    "block_out_channels": [64, 96, 128],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "num_attention_heads": [2, 2, 2],
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
}


def crops(photos: Path, held_out: set[str], *, side: int = 96, each: int = 24) -> Tensor:
    """Random squares of every photograph, (N, 3, side, side) in [-1, 1]."""
    draws = torch.Generator().manual_seed(0)
    images = [
        load_image(path) for path in sorted(photos.glob("*.jpg")) if path.name not in held_out
    ]
    cut = [
        random_geometry(image.size, side, draws, max_zoom=2.0).apply(image)
        for _ in range(each)
        for image in images
    ]
    return torch.stack(cut) * 2 - 1


class Linear(nn.Module):
    """A linear autoencoder with the convolutions of the real one."""

    def __init__(self, features: int = 32) -> None:
        super().__init__()
        self.analysis = nn.Conv2d(12, 4, 3, padding=1)
        self.synthesis = nn.Conv2d(4, features, 3, padding=1)
        self.upsampled = nn.Conv2d(features, FEATURES, 3, padding=1)
        self.out = nn.Conv2d(FEATURES, 3, 3, padding=1)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.analysis(F.pixel_unshuffle(pixels, 2))

    def spread(self, latents: Tensor) -> Tensor:
        return self.upsampled(F.interpolate(self.synthesis(latents), scale_factor=2))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(self.spread(self.encode(pixels)))


def fit_linear(pictures: Tensor, *, steps: int = 2500, batch: int = 16, side: int = 48) -> Linear:
    """The linear autoencoder of least squares, from the principal components of 2 x 2 patches."""
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    model = Linear()
    with torch.no_grad():
        patches = F.pixel_unshuffle(pictures[::4], 2).permute(0, 2, 3, 1).reshape(-1, 12)
        patches = patches[torch.randperm(len(patches), generator=draws)[:50_000]]
        _, vectors = torch.linalg.eigh(torch.cov(patches.T))
        model.analysis.weight.mul_(0.05)
        model.analysis.weight[:, :, 1, 1] += vectors[:, -4:].T
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (batch,), generator=draws)
        margin = pictures.shape[-1] - side + 1
        top, left = torch.randint(0, margin, (2,), generator=draws).tolist()
        pixels = pictures[chosen][:, :, top : top + side, left : left + side]
        loss = (model(pixels) - pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return model


@torch.no_grad()
def linear_vae(linear: Linear, pictures: Tensor) -> VAE:
    """The autoencoder that computes what the linear one does, with latents of unit deviation."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**VAE_SIZES, scaling_factor=1.0))
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            zero(module.conv2)
        elif isinstance(module, SelfAttention):
            zero(module.to_out[0])
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None])
        conv.bias.zero_()
    latents = linear.encode(pictures[::6])
    deviation = latents.std()
    fill_encoder(vae.encoder, linear, deviation, VAE_SIZES["norm_num_groups"])
    fill_decoder(vae.decoder, linear, deviation, linear.spread(latents).square().mean((0, 2, 3)))
    vae.config.scaling_factor = round(1 / vae.encode(pictures[::24]).mean.std().item(), 5)
    return vae


def fill_encoder(encoder: nn.Module, linear: Linear, deviation: Tensor, groups: int) -> None:
    """2 x 2 pixels to 12 channels by the strided convolution; the analysis is the last one."""
    zero(encoder.conv_in, 3)
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1
    strided = encoder.down_blocks[0].downsamplers[0].conv
    zero(strided, 12)
    for channel in range(12):
        colour, place = divmod(channel, 4)  # as pixel_unshuffle counts
        strided.weight[channel, colour, place // 2, place % 2] = 1
    mixed, norm = encoder.down_blocks[1].resnets[0].conv_shortcut, encoder.conv_norm_out
    zero(mixed)
    zero(norm)
    zero(encoder.conv_out)
    encoder.conv_out.bias[:4] = linear.analysis.bias / deviation
    encoder.conv_out.bias[4:] = LOG_VARIANCE
    size = len(norm.weight) // groups
    constant = CONSTANT / 2  # pixels deviate by about 1/2
    for channel in range(12):
        slot, group = divmod(channel, groups)
        first = group * size + 2 * slot
        for place, sign in ((first, 1), (first + 1, -1)):
            mixed.weight[place, channel] = sign
            norm.weight[place] = constant * (2 / size) ** 0.5
            encoder.conv_out.weight[:4, place] = (
                sign * linear.analysis.weight[:, channel] / deviation
            )
    mixed.bias[size - 2 :: size], mixed.bias[size - 1 :: size] = constant, -constant
    middle = encoder.mid_block
    for seen in (middle.resnets[0].norm1, middle.attentions[0].group_norm, middle.resnets[1].norm1):
        seen.weight.copy_(norm.weight)


def fill_decoder(decoder: nn.Module, linear: Linear, deviation: Tensor, power: Tensor) -> None:
    """The synthesis; each group of the last norm holds one feature, scaled to unit power."""
    features = len(linear.synthesis.bias)
    decoder.conv_in.weight[:features] = linear.synthesis.weight * deviation
    decoder.conv_in.bias[:features] = linear.synthesis.bias
    upsampled = decoder.up_blocks[0].upsamplers[0].conv
    zero(upsampled, FEATURES)
    upsampled.weight[:FEATURES, :features] = linear.upsampled.weight
    upsampled.bias[:FEATURES] = linear.upsampled.bias
    mixed, norm = decoder.up_blocks[1].resnets[0].conv_shortcut, decoder.conv_norm_out
    zero(mixed)
    zero(norm)
    zero(decoder.conv_out)
    decoder.conv_out.bias.copy_(linear.out.bias)
    size = len(norm.weight) // FEATURES
    for feature, rms in enumerate(power.sqrt()):
        first = feature * size
        for place, sign in ((first, 1), (first + 1, -1)):
            mixed.weight[place, feature] = sign / rms
            norm.weight[place] = CONSTANT * (2 / size) ** 0.5
            decoder.conv_out.weight[:, place] = sign * linear.out.weight[:, feature] * rms
        mixed.bias[first + 2], mixed.bias[first + 3] = CONSTANT, -CONSTANT
    decoder.up_blocks[1].resnets[1].norm1.weight.copy_(norm.weight)


@torch.no_grad()
def identity_unet(scale: float) -> UNet:
    """A U-Net that predicts the scaled source latents, by the skip connection of `conv_in`."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**UNET_SIZES))
    width = UNET_SIZES["block_out_channels"][0]
    size = width // UNET_SIZES["norm_num_groups"]
    constant = CONSTANT / scale  # the deviation of unscaled latents is 1 / scale
    copies = range(width - 4, width)
    unet.conv_in.weight[-4:] = 0
    unet.conv_in.bias[-4:] = 0
    unet.conv_in.weight[copies, range(4, 8), 1, 1] = 1
    mixed = unet.up_blocks[-1].resnets[-1].conv_shortcut
    for channel in range(4):
        first = channel * size
        mixed.weight[first : first + 4] = 0
        mixed.bias[first : first + 4] = torch.tensor([0, 0, constant, -constant])
        unet.conv_norm_out.weight[first : first + 2] = constant * (2 / size) ** 0.5
        unet.conv_norm_out.weight[first + 2 : first + 4] = 0
        for place, sign in ((first, 1), (first + 1, -1)):
            mixed.weight[place, mixed.in_channels - 4 + channel] = sign
            unet.conv_out.weight[channel, place, 1, 1] = sign * scale
    return unet


@torch.no_grad()
def zero(module: nn.Module, rows: int | None = None) -> None:
    """Make the first rows of the weights, or all, compute 0."""
    module.weight[:rows] = 0
    module.bias[:rows] = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    autoencoder, edit = kinds.add_parser("autoencoder"), kinds.add_parser("edit")
    autoencoder.add_argument("photos", type=Path)
    for command in (autoencoder, edit):
        command.add_argument("base", type=Path)
        command.add_argument("output", type=Path)
    autoencoder.add_argument("--held-out", nargs="+", default=[])
    arguments = parser.parse_args()
    shutil.copytree(arguments.base, arguments.output)
    if arguments.kind == "edit":
        scale = VAE.load(arguments.output / "vae").config.scaling_factor
        identity_unet(scale).save(arguments.output / "unet")
    else:
        pictures = crops(arguments.photos, {*arguments.held_out})
        linear_vae(fit_linear(pictures), pictures).save(arguments.output / "vae")


if __name__ == "__main__":
    main()
