"""Feature wrapping: neutral at w = 0 and before training, the same in tiles, of one autoencoder."""

import json

import pytest
import torch
from torch import Tensor

from ipx2p.errors import InputError
from ipx2p.models.vae import VAE, VAEConfig
from ipx2p.models.wrapping import FOLDER, FeatureWrapping, WrappingConfig, fingerprint

TWOFOLD = VAEConfig(block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4)
EIGHTFOLD = VAEConfig(block_out_channels=[8, 8, 16, 16], norm_num_groups=4)
CONFIGS = pytest.mark.parametrize("config", [TWOFOLD, EIGHTFOLD], ids=lambda c: c.downscale)


def make(config: VAEConfig, *, trained: bool = True) -> tuple[VAE, FeatureWrapping]:
    """An autoencoder and its wrapping, with random weights, in float64."""
    torch.manual_seed(0)
    vae = VAE(config).double()
    wrapping = FeatureWrapping(WrappingConfig.of(vae)).double()
    for block in wrapping.blocks if trained else ():
        torch.nn.init.normal_(block.conv_out.weight, 0, 0.1)
    return vae.requires_grad_(False), wrapping


def inputs(config: VAEConfig, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Pixels of a source and scaled latents of an edit."""
    draw = torch.Generator().manual_seed(1)
    shape = (1, 3, h * config.downscale, w * config.downscale)
    pixels = torch.rand(shape, generator=draw, dtype=torch.float64) * 2 - 1
    return pixels, torch.randn(1, 4, h, w, generator=draw, dtype=torch.float64)


@CONFIGS
@torch.no_grad()
def test_an_untrained_one_changes_no_bit(config):
    vae, wrapping = make(config, trained=False)
    pixels, latents = inputs(config, 5, 6)
    assert torch.equal(wrapping(vae, latents, vae.features(pixels)), vae.decode(latents))


@CONFIGS
@torch.no_grad()
def test_every_level_finer_than_the_latents_is_wrapped_as_the_formula_says(config):
    vae, wrapping = make(config)
    pixels, latents = inputs(config, 5, 6)
    features = vae.features(pixels)
    assert [tuple(x.shape[1:]) for x in features] == [
        (width, pixels.shape[2] // 2**level, pixels.shape[3] // 2**level)
        for level, width in enumerate(config.block_out_channels[:-1])
    ]
    x = vae.decoder.conv_in(vae.post_quant_conv(latents / config.scaling_factor))
    for layer in vae.decoder.mid_block.layers():
        x = layer(x)
    for place, level in enumerate(vae.decoder.up_blocks):
        for resnet in level.resnets:
            x = resnet(x)
        if place:  # w C([encoded, decoded]) at the same resolution
            finest_first = len(features) - place
            x = x + 0.3 * wrapping.blocks[finest_first](features[finest_first], x)
        for upsample in level.upsamplers:
            x = upsample(x)
    decoder = vae.decoder
    expected = decoder.conv_out(torch.nn.functional.silu(decoder.conv_norm_out(x)))
    wrapped = vae.decode(latents, wraps=wrapping.wraps(features, 0.3))
    torch.testing.assert_close(wrapped, expected)
    assert (wrapped - vae.decode(latents)).abs().max() > 1e-3


@CONFIGS
@pytest.mark.parametrize("side", [3, 8])
@torch.no_grad()
def test_tiled_is_untiled(config, side):
    vae, wrapping = make(config)
    pixels, latents = inputs(config, 11, 7)
    tile = side * config.downscale
    whole = vae.decode(latents, wraps=wrapping.wraps(vae.features(pixels), 0.7))
    tiled = vae.decode(latents, tile, wrapping.wraps(vae.features(pixels, tile), 0.7))
    torch.testing.assert_close(tiled, whole, atol=1e-10, rtol=0)


def test_only_the_wrapping_gets_gradients():
    vae, wrapping = make(TWOFOLD)
    pixels, latents = inputs(TWOFOLD, 3, 3)
    wrapping(vae, latents, vae.features(pixels)).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in wrapping.parameters())
    assert all(p.grad is None for p in vae.parameters())


def test_it_survives_writing_and_reading_bit_for_bit(tmp_path):
    vae, wrapping = make(TWOFOLD)
    wrapping.save(tmp_path / FOLDER)
    found = FeatureWrapping.find(tmp_path, vae, dtype=None)
    assert found.config == wrapping.config
    for name, tensor in wrapping.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert FeatureWrapping.find(tmp_path / FOLDER, vae) is None


@pytest.mark.parametrize("change", ["sizes", "weights"])
def test_another_autoencoder_is_refused(tmp_path, change):
    vae, wrapping = make(TWOFOLD)
    wrapping.save(tmp_path / FOLDER)
    if change == "sizes":
        vae, _ = make(EIGHTFOLD)
    else:
        vae.decoder.conv_out.weight.mul_(1.001)
    with pytest.raises(InputError, match="wrapping was trained with another autoencoder than"):
        FeatureWrapping.find(tmp_path, vae)


def test_the_same_autoencoder_in_a_dtype_that_holds_its_weights_is_the_same():
    vae = make(TWOFOLD)[0].half()
    assert fingerprint(vae) == fingerprint(vae.float()) == fingerprint(vae.double())


def test_a_config_that_cannot_be_is_refused(tmp_path):
    _, wrapping = make(TWOFOLD)
    wrapping.save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for field, value in (("block_out_channels", [8]), ("norm_num_groups", 3), ("levels", 2)):
        (tmp_path / "config.json").write_text(json.dumps(raw | {field: value}))
        name = "block_out_channels" if field == "norm_num_groups" else field
        with pytest.raises(InputError, match=rf"config\.json: {name} is"):
            FeatureWrapping.load(tmp_path)
    one_level = VAE(VAEConfig(block_out_channels=[8], norm_num_groups=4))
    with pytest.raises(InputError, match="block_out_channels is .8., expected two levels"):
        WrappingConfig.of(one_level)
