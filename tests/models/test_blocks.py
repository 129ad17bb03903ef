"""Blocks that U-Net and VAE share."""

import torch

from ipx2p.models.blocks import Attention, Downsample, timestep_embedding


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
