"""The U-Net against the reference, its config, its layout, its compiled form."""

import json

import pytest
import torch

from ipx2p.errors import InputError
from ipx2p.models.unet import UNet, UNetConfig
from tests.conftest import GOLDEN

PREFIXES = {"diffusers": "unet", "diffusers_v2": "v2.unet"}


def with_random_weights(unet: UNet, seed: int = 0) -> UNet:
    """Fresh networks have zeros in places; fill everything."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=source))
    return unet.eval()


def small_config(**changes) -> UNetConfig:
    """Sizes for quick tests."""
    sizes = {
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "num_attention_heads": [2, 2],
        "layers_per_block": 1,
        "cross_attention_dim": 6,
        "norm_num_groups": 4,
    }
    return UNetConfig(**(sizes | changes))


@torch.no_grad()
def run(unet: UNet, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return unet(x[:, :4], timesteps, text, x[:, 4:])


@pytest.mark.parametrize("folder", PREFIXES)
def test_unet_matches_the_reference(golden, folder):
    unet, prefix = UNet.load(GOLDEN / folder / "unet"), PREFIXES[folder]
    got = run(unet, golden["unet.x"], golden["unet.t"], golden[f"{prefix}.context"])
    torch.testing.assert_close(got, golden[f"{prefix}.out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "timestep"), [("wide", 500), ("odd", 333)])
def test_unet_matches_the_reference_at_any_size(golden, editor, shape, timestep):
    text = golden["unet.context"][:1]
    got = run(editor.unet, golden[f"unet.x_{shape}"], torch.tensor([timestep]), text)
    torch.testing.assert_close(got, golden[f"unet.out_{shape}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (13, 7)])
def test_latents_of_any_size_keep_their_size(editor, generator, size):
    x = torch.randn(1, 8, *size, generator=generator)
    got = run(editor.unet, x, torch.tensor([10.5]), torch.zeros(1, 77, 32))
    assert got.shape == (1, 4, *size) and got.isfinite().all()


@pytest.mark.parametrize("in_channels", [8, 4])
def test_real_size_model_has_the_published_names_and_shapes(in_channels):
    layouts = json.loads((GOLDEN / "sd15_layouts.json").read_text())
    expected = {key: tuple(shape) for key, shape in layouts["diffusers"]["unet"].items()}
    expected["conv_in.weight"] = (320, in_channels, 3, 3)
    with torch.device("meta"):
        unet = UNet(UNetConfig(in_channels=in_channels))
    assert {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()} == expected


@pytest.mark.parametrize("folder", PREFIXES)
def test_config_survives_writing_and_reading(tmp_path, folder):
    config = UNetConfig.read(GOLDEN / folder / "unet" / "config.json")
    config.write(tmp_path / "config.json")
    assert UNetConfig.read(tmp_path / "config.json") == config
    published = json.loads((GOLDEN / folder / "unet" / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: published[key] for key in written if key in published} == written


def test_fields_left_out_mean_what_the_published_code_means(tmp_path):
    (tmp_path / "config.json").write_text('{"block_out_channels": [32, 64, 64, 64]}')
    config = UNetConfig.read(tmp_path / "config.json")
    assert (config.in_channels, config.cross_attention_dim) == (4, 1280)
    assert config.num_attention_heads == [8] * 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("in_channels", 9),
        ("out_channels", 8),
        ("act_fn", "gelu"),
        ("class_embed_type", "timestep"),
        ("dual_cross_attention", True),
        ("mid_block_type", None),
        ("only_cross_attention", [True, True, True, False]),
        ("down_block_types", ["ResnetDownsampleBlock2D"] * 4),
        ("up_block_types", ["UpBlock2D"] * 4),
        ("attention_head_dim", [4, 4]),
        ("attention_head_dim", 3),
        ("norm_num_groups", None),
        ("norm_num_groups", 5),
        ("block_out_channels", 32),
        ("layers_per_block", [1, 2, 2, 2]),
        ("transformer_layers_per_block", [1, 2, 4, 8]),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_embedding_type", "fourier"),
        ("a_field_of_the_future", 3),
    ],
)
def test_config_that_cannot_be_honoured_is_refused_by_field(tmp_path, field, value):
    raw = json.loads((GOLDEN / "diffusers" / "unet" / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw | {field: value}))
    name = "num_attention_heads" if field == "attention_head_dim" else field
    name = "block_out_channels" if (field, value) == ("norm_num_groups", 5) else name
    with pytest.raises(InputError, match=rf"config\.json: {name}\b"):
        UNetConfig.read(path)


@pytest.mark.parametrize("linear", [True, False])
def test_compiled_unet_is_one_graph_and_equals_eager(generator, linear):
    unet = with_random_weights(UNet(small_config(use_linear_projection=linear)))
    x = torch.randn(2, 8, 6, 5, generator=generator)
    timesteps, text = torch.tensor([3.5, 900.0]), torch.randn(2, 77, 6, generator=generator)
    expected = run(unet, x, timesteps, text)
    keys = list(unet.state_dict())
    torch._dynamo.reset()
    unet.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(unet, x, timesteps, text), expected)
    assert list(unet.state_dict()) == keys
    torch._dynamo.reset()


def test_fresh_unet_predicts_nothing_and_learns(generator):
    unet = UNet(small_config())
    x = torch.randn(1, 8, 4, 4, generator=generator)
    text = torch.randn(1, 77, 6, generator=generator)
    prediction = unet(x[:, :4], torch.tensor([5]), text, x[:, 4:])
    assert prediction.count_nonzero() == 0
    (prediction - x[:, :4]).square().mean().backward()
    assert unet.conv_out.weight.grad.abs().max() > 0


def test_saved_unet_loads_bit_for_bit_in_its_dtype(tmp_path):
    unet = with_random_weights(UNet(small_config())).to(torch.bfloat16)
    unet.save(tmp_path)
    loaded = UNet.load(tmp_path, dtype=None)
    assert loaded.config == unet.config
    for key, tensor in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)


def test_text_to_image_unet_takes_no_source(generator):
    unet = with_random_weights(UNet(small_config(in_channels=4)))
    x = torch.randn(1, 4, 4, 4, generator=generator)
    got = unet(x, torch.tensor([5]), torch.randn(1, 77, 6, generator=generator), None)
    assert got.shape == x.shape


@pytest.mark.parametrize(("in_channels", "source"), [(8, None), (4, torch.zeros(1, 4, 4, 4))])
def test_a_missing_or_needless_source_is_refused(in_channels, source):
    unet = UNet(small_config(in_channels=in_channels))
    x, text = torch.zeros(1, 4, 4, 4), torch.zeros(1, 77, 6)
    with pytest.raises(InputError, match=f"has {in_channels} input channels and was given"):
        unet(x, torch.tensor([5]), text, source)


@torch.no_grad()
def test_a_projected_instruction_gives_the_same_bits(editor, generator):
    unet = editor.unet
    latents, source = torch.randn(2, 2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    shown = (latents, torch.tensor([10.0, 900.0]), text, source)
    projected = unet.project_text(text)
    assert [*projected] == unet.attention_layers
    assert torch.equal(unet(*shown[:2], projected, source), unet(*shown))
