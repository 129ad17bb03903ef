"""Blocks that U-Net and VAE share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipx2p.models import blocks
from ipx2p.models.blocks import (
    Attention,
    Conv3x3,
    Downsample,
    Linear,
    TokenConv,
    Upsample,
    timestep_embedding,
)


def test_timestep_embedding_is_computed_in_float32():
    # bfloat16 rounds 951 to 952; whatever comes in, neighbours stay apart.
    embedding = timestep_embedding(torch.tensor([951, 952]), 32)
    assert embedding.dtype == torch.float32
    assert (embedding[0] - embedding[1]).abs().max() > 0.1


def test_timestep_embedding_tells_fractions_apart():
    whole, fraction = timestep_embedding(torch.tensor([946.0, 946.42]), 32)
    assert (whole - fraction).abs().max() > 0.1


def test_timestep_embedding_is_cosines_then_sines():
    embedding = timestep_embedding(torch.tensor([0.0, 1.0]), 8)
    torch.testing.assert_close(embedding[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    frequencies = torch.tensor([10_000 ** (-i / 4) for i in range(4)])
    torch.testing.assert_close(embedding[1], torch.cat([frequencies.cos(), frequencies.sin()]))


def test_attention_equals_softmax_written_out(generator):
    attention = Attention(12, heads=3, context_dim=5, qkv_bias=True)
    tokens = torch.randn(2, 7, 12, generator=generator)
    context = torch.randn(2, 4, 5, generator=generator)
    q, k, v = attention.to_q(tokens), attention.to_k(context), attention.to_v(context)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 4**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    expected = attention.to_out(torch.cat(heads, -1))
    torch.testing.assert_close(attention(tokens, context), expected)


def test_downsampling_pads_as_its_network_does(generator):
    x = torch.randn(1, 2, 6, 6, generator=generator)
    for pad_all in (True, False):
        down = Downsample(2, pad_all=pad_all)
        assert down(x).shape == (1, 2, 3, 3)
        # The first output sees the left border only where it is padded.
        window = torch.zeros(1, 2, 3, 3)
        if pad_all:
            window[:, :, 1:, 1:] = x[:, :, :2, :2]
        else:
            window[:] = x[:, :, :3, :3]
        expected = (down.conv.weight * window).sum(dim=(1, 2, 3)) + down.conv.bias
        torch.testing.assert_close(down(x)[0, :, 0, 0], expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 300, 48), (3, 48), (48,), (1, 0, 48)])
def test_linear_layers_without_gradients_are_the_same(generator, bias, shape):
    layer = Linear(48, 64, bias=bias)
    x = torch.randn(*shape, generator=generator)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
        turned = x.transpose(0, -1).contiguous().transpose(0, -1)  # other strides
        torch.testing.assert_close(layer(turned), expected, atol=1e-5, rtol=1e-5)
        double = layer.double()(x.double())
    torch.testing.assert_close(double.float(), expected, atol=1e-5, rtol=1e-5)


def test_linear_layers_take_and_give_gradients(generator):
    x = torch.randn(2, 7, 16, generator=generator, requires_grad=True)
    for layer in (Linear(16, 8), TokenConv(16, 8)):
        layer(x).sum().backward()
        assert layer.weight.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_linear_layers_without_gradients_are_those_of_onednn(generator, monkeypatch):
    x, layer = torch.randn(2, 7, 16, generator=generator), Linear(16, 8)

    def operators() -> set[str]:
        with torch.no_grad(), torch.profiler.profile() as trace:
            layer(x)
        return {event.key for event in trace.key_averages()}

    assert ("mkldnn::_linear_pointwise" in operators()) == blocks.HAS_MKL
    monkeypatch.setattr(blocks, "HAS_MKL", False)
    assert "aten::linear" in operators()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("stride", "padding", "size"), [(1, 1, (4, 3)), (2, 1, (5, 4)), (2, 0, (5, 7))]
)
def test_a_convolution_as_a_matrix_product_is_the_same(
    generator, channels_last, stride, padding, size
):
    layer = Conv3x3(6, 10, stride=stride, padding=padding).double()
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, *size, generator=generator, dtype=torch.double, requires_grad=True)
    expected = F.conv2d(x, layer.weight, layer.bias, stride, padding)
    product = layer.as_product(x)
    torch.testing.assert_close(product, expected)
    weights = torch.randn(product.shape, generator=generator, dtype=torch.double)
    leaves = [x, layer.weight, layer.bias]
    for got, wanted in zip(
        torch.autograd.grad((product * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
    # DDP wants gradients in the memory layout of their weights.
    (layer.as_product(x) * weights).sum().backward()
    assert layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.parametrize("grad", [True, False])
def test_a_product_under_autocast_is_nearly_the_convolution(grad):
    torch.manual_seed(0)
    layer, x = Conv3x3(16, 16), torch.randn(2, 16, 4, 4)
    expected = nn.Conv2d.forward(layer, nn.Conv2d.forward(layer, x))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        once = layer.as_product(x).bfloat16()
        twice = layer.as_product(once)
    assert (twice - expected).abs().max() < 0.02
    assert twice.dtype == torch.bfloat16 or not grad


def test_a_large_weight_is_multiplied_and_a_small_one_convolved(generator, monkeypatch):
    multiplied = []
    as_product = Conv3x3.as_product
    monkeypatch.setattr(
        Conv3x3, "as_product", lambda self, x: multiplied.append(x.shape) or as_product(self, x)
    )
    layer = Conv3x3(16, 32)  # 4608 weights
    for side in (2, 16):
        layer(torch.randn(1, 16, side, side, generator=generator))
    assert multiplied == [(1, 16, 2, 2)]


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 18)])
def test_enlarging_in_phases_is_the_same(generator, size):
    layer = Upsample(4).double()
    x = torch.randn(2, 4, *size, generator=generator, dtype=torch.double)
    expected = layer.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(layer.in_phases(x), expected)
    torch.testing.assert_close(layer(x), expected)
