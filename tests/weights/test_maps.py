"""Key tables between the original layout and the native one."""

import json

import pytest
import torch

from ipx2p.diffusion.schedule import ScheduleConfig
from ipx2p.models.clip import ClipText
from ipx2p.models.text import TextEncoder, load_tokenizer
from ipx2p.models.unet import UNet, UNetConfig
from ipx2p.models.vae import VAE, VAEConfig
from ipx2p.published_fields import CLIP_L
from ipx2p.weights.folder import Weights
from ipx2p.weights.maps import ema_key, is_dropped, unet_table, vae_table
from ipx2p.weights.single_file import original_tensors
from tests.conftest import GOLDEN

LAYOUTS = json.loads((GOLDEN / "sd15_layouts.json").read_text())


def real_size_model() -> Weights:
    """Stable Diffusion 1.x as an edit model, without values."""
    tokenizer = GOLDEN / "diffusers" / "tokenizer"
    with torch.device("meta"):
        unet, vae, clip = UNet(UNetConfig()), VAE(VAEConfig()), ClipText(CLIP_L)
    text = TextEncoder(clip, CLIP_L, *load_tokenizer(tokenizer))
    return Weights(unet, vae, text, ScheduleConfig())


def test_table_is_a_bijection_onto_the_original_layout():
    expected = {key: tuple(shape) for key, shape in LAYOUTS["ldm"].items()}
    tensors = original_tensors(real_size_model())
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    num_native = sum(len(tensors) for tensors in LAYOUTS["diffusers"].values())
    assert len(tensors) == num_native  # no two native keys went to the same place


def test_real_size_text_encoder_has_the_published_names_and_shapes():
    text = real_size_model().text.model
    got = {f"text_model.{key}": tensor for key, tensor in text.state_dict().items()}
    expected = {key: tuple(shape) for key, shape in LAYOUTS["diffusers"]["text_encoder"].items()}
    assert {key: tuple(tensor.shape) for key, tensor in got.items()} == expected


@pytest.mark.parametrize(
    ("native", "original"),
    [
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("down_blocks.0.downsamplers.0.conv.bias", "input_blocks.3.0.op.bias"),
        ("down_blocks.1.resnets.0.conv_shortcut.weight", "input_blocks.4.0.skip_connection.weight"),
        ("down_blocks.3.resnets.1.norm1.weight", "input_blocks.11.0.in_layers.0.weight"),
        ("mid_block.attentions.0.proj_in.weight", "middle_block.1.proj_in.weight"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("up_blocks.3.resnets.2.time_emb_proj.bias", "output_blocks.11.0.emb_layers.1.bias"),
        ("conv_norm_out.weight", "out.0.weight"),
    ],
)
def test_unet_keys_go_where_the_original_code_has_them(native, original):
    table = unet_table(UNetConfig(), [native])
    assert table == {native: f"model.diffusion_model.{original}"}


@pytest.mark.parametrize(
    ("native", "original"),
    [
        (
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
            "encoder.down.1.block.0.nin_shortcut.bias",
        ),
        ("decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
        ("decoder.up_blocks.2.upsamplers.0.conv.weight", "decoder.up.1.upsample.conv.weight"),
        ("decoder.mid_block.attentions.0.to_out.0.bias", "decoder.mid.attn_1.proj_out.bias"),
        ("encoder.conv_norm_out.weight", "encoder.norm_out.weight"),
        ("quant_conv.weight", "quant_conv.weight"),
    ],
)
def test_vae_keys_go_where_the_original_code_has_them(native, original):
    assert vae_table(VAEConfig(), [native]) == {native: original}


def test_averages_are_named_without_dots():
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert ema_key(key) == "model_ema.diffusion_modelinput_blocks00weight"


def test_what_is_left_out_on_purpose():
    for key in (
        "betas",
        "model_ema.decay",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "first_stage_model.loss.logvar",
    ):
        assert is_dropped(key)
    assert not any(is_dropped(key) for key in LAYOUTS["ldm"])
