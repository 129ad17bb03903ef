"""The U-Net against the reference, its config, layout, compiled form, shallow part, and work."""

import json

import pytest
import torch

from ipx2p.errors import InputError
from ipx2p.models.flops import counted_flops, shallow_share
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
def run(
    unet: UNet, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, **more
) -> torch.Tensor:
    return unet(x[:, :4], timesteps, text, x[:, 4:], **more)


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
    deep = []
    for _ in ("whole", "shallow"):
        torch.testing.assert_close(run(unet, x, timesteps, text, deep=deep), expected)
    assert len(deep) == 1
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


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_shallow_part_around_its_own_deep_feature_gives_the_same_bits(
    generator, levels, layers
):
    config = small_config(layers_per_block=layers)
    for name in ("block_out_channels", "down_block_types", "num_attention_heads"):
        setattr(config, name, getattr(config, name)[:levels])
    unet = with_random_weights(UNet(config))
    x = torch.randn(2, 8, 6, 5, generator=generator)
    shown = (x, torch.tensor([3.5, 900.0]), torch.randn(2, 77, 6, generator=generator))
    deep = []
    assert torch.equal(run(unet, *shown, deep=deep), run(unet, *shown))
    assert torch.equal(run(unet, *shown, deep=deep), run(unet, *shown))
    assert len(deep) == 1


@torch.no_grad()
def test_around_a_deep_feature_only_the_shallow_part_runs(editor, generator):
    unet = editor.unet
    latents, source, other = torch.randn(3, 2, 4, 8, 8, generator=generator)
    text = unet.project_text(torch.randn(2, 77, 32, generator=generator))
    deep, ran = [], []
    unet(latents, torch.tensor([500.0, 900.0]), text, source, deep=deep)
    [feature] = deep
    names = {module: name for name, module in unet.named_modules() if name.count(".") == 3}
    hooks = [m.register_forward_hook(lambda m, *_: ran.append(names[m])) for m in names]
    got = unet(other, torch.tensor([400.0, 800.0]), text, source, deep=deep)
    for hook in hooks:
        hook.remove()
    blocks = {"down_blocks.0": "0", "up_blocks.3": "12"}
    assert [name for name in ran if name.split(".")[2] in ("resnets", "attentions")] == [
        f"{block}.{kind}.{index}"
        for block, indices in blocks.items() for index in indices
        for kind in ("resnets", "attentions")
    ]  # fmt: skip
    assert deep[0] is feature
    assert (got - unet(other, torch.tensor([400.0, 800.0]), text, source)).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("side", "teraflops"), [(32, 0.54), (64, 2.41)])
def test_flops_of_stable_diffusion_are_those_counted_by_hand(side, teraflops):
    flops = counted_flops(UNetConfig(in_channels=8), side, side, training=True)
    assert flops / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_flops_of_the_shallow_part_are_those_counted_by_hand():
    """Of Stable Diffusion at 512 pixels: three layers of 320 channels, two of them with twice as
    many at their input, the convolutions at both ends, and the embedding of the timestep."""
    pixels, tokens, width, time = 64 * 64, 77, 320, 1280
    convolutions = 3 * 2 * 9 * width**2 + 2 * (9 + 2) * width**2 + 9 * (8 + 4) * width
    attention = 3 * (2 * pixels * width + (4 + 2) * width**2 + 2 * tokens * width)
    rest = 3 * (2 * width**2 + 12 * width**2)  # in, out; feed-forward, gated
    once = 3 * (2 * tokens * 768 * width + time * width) + width * time + time**2
    by_hand = 2 * (pixels * (convolutions + attention + rest) + once)
    flops = counted_flops(UNetConfig(in_channels=8), 64, 64, shallow=True)
    assert flops == pytest.approx(by_hand, rel=1e-3)
    assert shallow_share(UNetConfig(in_channels=8), 64, 64) == pytest.approx(0.224, abs=1e-3)
