"""Overlapping windows: their weights, and what they make of networks that are known in full."""

import math
from itertools import pairwise

import pytest
import torch

from ipx2p.diffusion.windows import Windows, cut
from tests.conftest import GOLDEN


class Known:
    """Predicts, in every window, a multiple of what it is shown and an offset by place in it."""

    def __init__(self, slope=0.5, offset=0.0):
        self.slope, self.offset = slope, offset
        self.sizes, self.given = [], []

    def __call__(self, latents, timesteps, text, source_latents, attention_overrides, deep):
        self.sizes.append(tuple(latents.shape[-2:]))
        self.given.append((attention_overrides, deep))
        rows = torch.arange(latents.shape[-2])[:, None]
        columns = torch.arange(latents.shape[-1])
        place = self.offset * (rows + 10 * columns)
        return self.slope * latents - source_latents + place + text[:, :1, :1, None]


def shown(*size, batch=2):
    draws = torch.Generator().manual_seed(3)
    latents, source = torch.randn(2, batch, 4, *size, generator=draws)
    return latents, torch.full((batch,), 500.0), torch.randn(batch, 7, 5, generator=draws), source


def call(windows, inputs, overrides=None, deep=None):
    return windows(*inputs, attention_overrides=overrides, deep=deep)


@pytest.mark.parametrize(
    ("length", "size", "starts"),
    [
        *((8, 8, [0]), (5, 8, [0]), (12, 8, [0, 4]), (16, 8, [0, 4, 8])),
        *((13, 8, [0, 4, 5]), (9, 8, [0, 1]), (11, 5, [0, 2, 4, 6]), (3, 1, [0, 1, 2])),
    ],
)
def test_windows_overlap_by_half_and_their_weights_add_up_to_one(length, size, starts):
    windows = cut(length, size)
    assert [start for start, _ in windows] == starts
    total = torch.zeros(length, dtype=torch.float64)
    for start, weights in windows:
        assert len(weights) == min(size, length) and (weights > 0).all()
        total[start : start + len(weights)] += weights
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-15, rtol=0)
    mirrored = [weights.flip(0) for _, weights in reversed(windows)]
    if len({b - a for a, b in pairwise(starts)}) < 2:  # evenly spaced
        for (_, weights), other in zip(windows, mirrored, strict=True):
            torch.testing.assert_close(weights, other, atol=1e-15, rtol=0)


@pytest.mark.parametrize("size", [(6, 4), (7, 9), (4, 13), (3, 6), (11, 10)])
def test_the_average_of_a_linear_network_is_its_closed_form(size):
    """Every pixel by hand: the Gaussian of StableSR around the centre of each window over it."""
    side, inputs = 4, shown(*size)
    latents, _, text, source = inputs
    got = call(Windows(Known(0.5, 0.25), side), inputs)
    starts = [
        sorted({*range(0, max(length - side, 0) + 1, side // 2), max(length - side, 0)})
        for length in size
    ]

    def bell(i, length):
        n = min(length, side)
        return math.exp(-(((i - (n - 1) / 2) / n) ** 2) / 0.02)

    offset = torch.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            over = [
                (y - top, x - left)
                for top in starts[0]
                for left in starts[1]
                if 0 <= y - top < side and 0 <= x - left < side
            ]
            weights = [bell(i, size[0]) * bell(j, size[1]) for i, j in over]
            places = [0.25 * (i + 10 * j) for i, j in over]
            both = zip(weights, places, strict=True)
            offset[y, x] = sum(a * b for a, b in both) / sum(weights)
    expected = 0.5 * latents - source + offset + text[:, :1, :1, None]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-6)


def test_one_network_runs_in_each_window_with_the_whole_batch():
    network = Known()
    call(Windows(network, 4), shown(9, 3), overrides={"mid": []})
    assert network.sizes == [(4, 3)] * 4
    assert network.given == [({"mid": []}, None)] * 4


def test_a_network_that_does_not_look_at_the_place_leaves_no_seam():
    inputs = shown(13, 22)
    got, whole = call(Windows(Known(), 8), inputs), call(Known(), inputs)
    torch.testing.assert_close(got, whole, atol=1e-6, rtol=0)
    inputs[0].fill_(1.0)
    inputs[3].zero_()
    got = call(Windows(Known(0.0), 8), inputs)
    assert (got - got[..., :1, :1]).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(8, 8), (5, 8), (3, 4)])
def test_one_window_is_the_network_bit_for_bit(editor, size):
    latents, timesteps, _, source = shown(*size)
    text = editor.text.encode(["a", "b"])
    with torch.no_grad():
        expected = editor.unet(latents, timesteps, text, source)
        got = Windows(editor.unet, 8)(latents, timesteps, text, source)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(editor):
    latents, timesteps, _, source = shown(13, 22)
    text = editor.text.encode(["derain it", "make it snow"])
    windows = Windows(editor.unet, 8)
    together = windows(latents, timesteps, windows.project_text(text), source)
    assert together.std() > 0.01
    for i in range(2):
        one = slice(i, i + 1)
        alone = windows(latents[one], timesteps[one], text[one], source[one])
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=0)


@torch.no_grad()
def test_deep_features_are_those_of_each_window(editor):
    latents, timesteps, _, source = shown(8, 21)
    text, deep = editor.text.encode(["derain it", "make it snow"]), []
    windows = Windows(editor.unet, 8)
    whole = windows(latents, timesteps, text, source, deep=deep)
    [kept] = deep
    assert kept.shape[:2] == (2, 5)  # batch first: branches are cut apart and put together there
    again = windows(latents, timesteps, text, source, deep=deep)  # around the same features
    torch.testing.assert_close(again, whole, atol=1e-6, rtol=0)
    assert torch.equal(deep[0], kept)
    last = []
    there = slice(13, 21)
    editor.unet(latents[..., there], timesteps, text, source[..., there], deep=last)
    assert torch.equal(kept[:, -1], last[0])


def test_half_precision_is_averaged_in_float32():
    from ipx2p.models.unet import UNet

    unet = UNet.load(GOLDEN / "diffusers" / "unet", torch.bfloat16)
    latents, timesteps, _, source = (x.bfloat16() for x in shown(8, 12))
    text = torch.zeros(2, 77, unet.config.cross_attention_dim, dtype=torch.bfloat16)
    with torch.no_grad():
        assert Windows(unet, 8)(latents, timesteps, text, source).dtype == torch.float32
