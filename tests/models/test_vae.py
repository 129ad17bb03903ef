"""The autoencoder against the reference, its config, its latent scale."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ipx2p.errors import InputError
from ipx2p.models.vae import OLD_ATTENTION_NAMES, VAE, Posterior, VAEConfig
from tests.conftest import GOLDEN


@torch.no_grad()
def test_encoder_matches_the_reference(golden, editor, editor_v2):
    posterior = editor.vae.encode(golden["vae.image"])
    torch.testing.assert_close(posterior.mean, golden["vae.mean"], atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.logvar, golden["vae.logvar"], atol=1e-4, rtol=0)
    posterior = editor_v2.vae.encode(golden["vae.image"])
    torch.testing.assert_close(posterior.mean, golden["v2.vae.mean"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_decoder_matches_the_reference(golden, editor):
    pixels = editor.vae.decode(editor.vae.scale(golden["vae.mean"]))
    torch.testing.assert_close(pixels, golden["vae.decoded"], atol=1e-4, rtol=0)


def test_all_norms_have_the_small_epsilon():
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    norms = [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 52 and {norm.eps for norm in norms} == {1e-6}


def test_real_size_model_has_the_published_names_and_shapes():
    layouts = json.loads((GOLDEN / "sd15_layouts.json").read_text())
    expected = {key: tuple(shape) for key, shape in layouts["diffusers"]["vae"].items()}
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    assert {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()} == expected


def test_old_names_of_the_attention_layers_load(tmp_path, editor):
    old_names = {new: old for old, new in OLD_ATTENTION_NAMES.items()}
    tensors = {}
    for key, tensor in load_file(
        GOLDEN / "diffusers" / "vae" / "diffusion_pytorch_model.safetensors"
    ).items():
        prefix, marker, rest = key.partition(".attentions.0.")
        layer, _, leaf = rest.rpartition(".")
        renamed = f"{prefix}{marker}{old_names.get(layer, layer)}.{leaf}"
        tensors[renamed if marker else key] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    config = (GOLDEN / "diffusers" / "vae" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    loaded = VAE.load(tmp_path)
    for key, tensor in editor.vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)


@pytest.mark.parametrize("folder", ["diffusers", "diffusers_v2"])
def test_config_survives_writing_and_reading(tmp_path, folder):
    published = json.loads((GOLDEN / folder / "vae" / "config.json").read_text())
    config = VAEConfig.read(GOLDEN / folder / "vae" / "config.json")
    assert config.downscale == 2 ** (len(published["block_out_channels"]) - 1)
    config.write(tmp_path / "config.json")
    assert VAEConfig.read(tmp_path / "config.json") == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: published[key] for key in written} == written


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latent_channels", 16),
        ("act_fn", "relu"),
        ("mid_block_add_attention", False),
        ("use_quant_conv", False),
        ("shift_factor", 0.1),
        ("latents_mean", [0.0] * 4),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("norm_num_groups", 7),
        ("scaling_factor", 0),
        ("layers_per_block", "two"),
        ("block_out_channels", 32),
    ],
)
def test_config_that_cannot_be_honoured_is_refused_by_field(tmp_path, field, value):
    raw = json.loads((GOLDEN / "diffusers" / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {field: value}))
    name = "block_out_channels" if field == "norm_num_groups" else field
    with pytest.raises(InputError, match=rf"config\.json: {name}\b"):
        VAEConfig.read(tmp_path / "config.json")


def test_picture_off_the_multiple_is_refused(editor):
    with pytest.raises(InputError, match="60 x 64 cannot be encoded"):
        editor.vae.encode(torch.zeros(1, 3, 64, 60))


def test_posterior_samples_around_its_mode(generator):
    moments = torch.cat([torch.full((1, 4, 64, 64), 3.0), torch.full((1, 4, 64, 64), -2.0)], dim=1)
    posterior = Posterior(moments)
    sample = posterior.sample(generator)
    assert torch.equal(posterior.mode(), posterior.mean)
    assert abs(sample.mean().item() - 3) < 0.02
    assert abs(sample.std().item() - torch.tensor(-1.0).exp().item()) < 0.01
    noise = torch.ones(1, 4, 64, 64)
    torch.testing.assert_close(posterior.sample(noise=noise), 3 + noise * torch.tensor(-1.0).exp())


def test_kl_is_that_of_two_gaussians():
    mean, logvar = torch.full((2, 4, 3, 3), 0.5), torch.full((2, 4, 3, 3), -1.0)
    posterior = Posterior(torch.cat([mean, logvar], dim=1))
    one = torch.distributions.Normal(0.5, torch.tensor(-0.5).exp())
    expected = torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0)) * 36
    torch.testing.assert_close(posterior.kl(), expected.expand(2))
