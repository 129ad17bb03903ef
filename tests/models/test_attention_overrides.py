"""Attention edits: they act on the layers and samples that are named, and on nothing else."""

import copy
import math

import pytest
import torch
from torch import nn

from ipx2p.models.blocks import Attention, blurred
from ipx2p.models.unet import UNet
from tests.conftest import GOLDEN

KINDS = [("identity", 0.0), ("blur", 1.0), ("blur", math.inf), ("skip", 0.0)]
LAYERS = ["down.0.1", "mid", "up.3.0"]


@pytest.fixture(scope="module")
def shown():
    """Three samples, not square, with at least 2 x 1 tokens in the middle."""
    source = torch.Generator().manual_seed(0)
    latents, source_latents = torch.randn(2, 3, 4, 16, 8, generator=source)
    text = torch.randn(3, 77, 32, generator=source)
    return latents, torch.tensor([10.0, 500.0, 990.0]), text, source_latents


@torch.no_grad()
def edited(unet, shown, kind, sigma, layers, rows=(True, True, True)):
    edits = {layer: [(kind, sigma, torch.tensor(rows))] for layer in layers}
    return unet(*shown, edits)


def test_layers_are_named_from_the_way_down_to_the_way_up(editor):
    names = editor.unet.attention_layers
    assert names[:2] == ["down.0.0", "down.0.1"] and "mid" in names and names[-1] == "up.3.2"
    assert len(set(names)) == len(names) == 16


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("kind", "sigma"), KINDS)
def test_an_edit_is_what_its_kind_says(editor, shown, monkeypatch, kind, sigma, layer):
    unet = copy.deepcopy(editor.unet)
    (transformer,) = (m for m in unet.modules() if getattr(m, "name", None) == layer)
    block = transformer.transformer_blocks[0]
    assert not torch.equal(edited(unet, shown, kind, sigma, [layer]), unet(*shown))
    got = edited(editor.unet, shown, kind, sigma, [layer])
    if kind == "identity":
        block.attn1.forward = lambda tokens, **_: block.attn1.to_out(block.attn1.to_v(tokens))
    elif kind == "skip":
        block.forward = lambda tokens, *_: tokens
    else:
        project, size = block.attn1.to_q, {"down.0.1": (16, 8), "mid": (2, 1), "up.3.0": (16, 8)}
        block.attn1.to_q = nn.Identity()
        block.attn1.to_q.forward = lambda tokens: blurred(project(tokens), size[layer], sigma)
    torch.testing.assert_close(got, unet(*shown), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "sigma"), KINDS)
def test_samples_that_no_edit_names_stay_bit_for_bit(editor, shown, kind, sigma):
    plain = editor.unet(*shown)
    got = edited(editor.unet, shown, kind, sigma, ["mid", "up.3.0"], (False, True, False))
    assert torch.equal(got[[0, 2]], plain[[0, 2]])
    assert (got[1] - plain[1]).abs().max() > 1e-5
    # Another layer is another edit; no layer is none.
    assert not torch.equal(got, edited(editor.unet, shown, kind, sigma, ["down.0.0"]))
    assert torch.equal(edited(editor.unet, shown, kind, sigma, []), plain)


@torch.no_grad()
def test_two_edits_of_one_layer_act_on_their_own_samples(editor, shown):
    rows = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    both = editor.unet(
        *shown, {"up.3.0": [("identity", 0.0, rows[0]), ("blur", math.inf, rows[1])]}
    )
    for (kind, sigma), chosen in zip((("identity", 0.0), ("blur", math.inf)), rows, strict=True):
        alone = editor.unet(*shown, {"up.3.0": [(kind, sigma, chosen)]})
        assert torch.equal(both[chosen], alone[chosen])


@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_blur_is_a_gaussian_over_the_picture_with_mirrored_borders(sigma):
    h, w = 9, 7
    tokens = torch.randn(1, h * w, 1, generator=torch.Generator().manual_seed(0)).double()
    got = blurred(tokens, (h, w), sigma).view(h, w)
    grid = tokens.view(h, w)

    def mirrored(i, side):
        i = abs(i)
        return i if i < side else 2 * (side - 1) - i

    def kernel(side):
        reach = min(math.ceil(6 * sigma) // 2, side // 2)
        weights = {i: math.exp(-i * i / (2 * sigma**2)) for i in range(-reach, reach + 1)}
        return {i: weight / sum(weights.values()) for i, weight in weights.items()}

    for y in range(h):
        for x in range(w):
            expected = sum(
                a * b * grid[mirrored(y + i, h), mirrored(x + j, w)]
                for i, a in kernel(h).items()
                for j, b in kernel(w).items()
            )
            torch.testing.assert_close(got[y, x], expected, rtol=1e-6, atol=1e-6)


def test_blur_of_any_width_takes_the_mean_at_infinity_and_nothing_at_a_token():
    tokens = torch.randn(2, 15, 4, generator=torch.Generator().manual_seed(0))
    mean = tokens.mean(1, keepdim=True).expand_as(tokens)
    for sigma in (math.inf, 1e4):
        torch.testing.assert_close(blurred(tokens, (3, 5), sigma), mean)
    torch.testing.assert_close(blurred(tokens, (3, 5), 0.05), tokens)
    assert torch.equal(blurred(tokens[:, :1], (1, 1), 4.0), tokens[:, :1])
    attention = Attention(4, heads=2)
    rows = torch.tensor([True, True])
    one = attention(tokens[:, :1], overrides=[("blur", 4.0, rows)], size=(1, 1))
    torch.testing.assert_close(one, attention(tokens[:, :1]))


@pytest.mark.slow
def test_edits_compile_into_one_graph_and_equal_eager(shown):
    unet = UNet.load(GOLDEN / "diffusers" / "unet")
    rows = torch.tensor([True, False, True])
    edits = {
        "mid": [("identity", 0.0, rows), ("skip", 0.0, ~rows)],
        "up.3.0": [("blur", 1.0, rows), ("blur", math.inf, ~rows)],
    }
    with torch.no_grad():
        expected = unet(*shown, edits)
        torch._dynamo.reset()
        unet.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(unet(*shown, edits), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
