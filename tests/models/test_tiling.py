"""The autoencoder in tiles: equal to the whole, without seams, reading exactly what it needs."""

import copy
import errno

import pytest
import torch
from torch import Tensor, nn

from ipx2p import devices
from ipx2p.errors import InputError
from ipx2p.models import tiling, vae
from ipx2p.models.blocks import Attention, Downsample, ResnetBlock, Upsample
from ipx2p.models.tiling import Window, attention_over, reach
from ipx2p.models.vae import VAE, VAEConfig

TWOFOLD = VAEConfig(block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4)
EIGHTFOLD = VAEConfig(block_out_channels=[8, 8, 16, 16], norm_num_groups=4)
ONE_LEVEL = VAEConfig(block_out_channels=[8], layers_per_block=3, norm_num_groups=2)
CONFIGS = pytest.mark.parametrize(
    "config", [TWOFOLD, EIGHTFOLD, ONE_LEVEL], ids=lambda c: c.downscale
)


def make_vae(config: VAEConfig) -> VAE:
    """Random weights in float64, those of the norms too."""
    torch.manual_seed(0)
    made = VAE(config).double()
    for module in made.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return made


def inputs(config: VAEConfig, h: int, w: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Pixels and latents of one size."""
    draw = torch.Generator().manual_seed(1)
    height, width = h * config.downscale, w * config.downscale
    pixels = torch.rand(batch, 3, height, width, generator=draw, dtype=torch.float64) * 2 - 1
    latents = torch.randn(batch, 4, h, w, generator=draw, dtype=torch.float64)
    return pixels, config.scale(latents)


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest, in standard deviations of what is expected."""
    return ((got - expected).abs().max() / expected.std()).item()


@CONFIGS
@pytest.mark.parametrize(
    ("h", "w", "side"),
    [
        pytest.param(6, 5, 8, id="one-tile"),
        pytest.param(12, 8, 4, id="many"),
        pytest.param(11, 7, 3, id="odd"),
        pytest.param(3, 13, 4, id="one-side-one-tile"),
    ],
)
@torch.no_grad()
def test_tiled_is_untiled(config, h, w, side):
    network, tile = make_vae(config), side * config.downscale
    pixels, latents = inputs(config, h, w, batch=2)
    whole, tiled = network.encode(pixels), network.encode(pixels, tile)
    assert difference(tiled.mean, whole.mean) < 1e-10
    assert difference(tiled.logvar, whole.logvar) < 1e-10
    assert difference(network.decode(latents, tile), network.decode(latents)) < 1e-10


@torch.no_grad()
def test_in_float32_tiles_round_no_worse_than_the_whole():
    exact = make_vae(EIGHTFOLD)
    single = copy.deepcopy(exact).float()
    pixels, latents = inputs(EIGHTFOLD, 11, 7)
    truths = exact.encode(pixels).mean, exact.decode(latents)
    pixels, latents = pixels.float(), latents.float()
    for truth, whole, tiled in zip(
        truths,
        (single.encode(pixels).mean, single.decode(latents)),
        (single.encode(pixels, 32).mean, single.decode(latents, 32)),
        strict=True,
    ):
        assert (tiled - whole).square().mean().sqrt() < 1e-5 * whole.std()
        assert difference(tiled.double(), truth) < 1.5 * difference(whole.double(), truth)


@torch.no_grad()
def test_weights_in_bfloat16_give_bfloat16():
    network = make_vae(TWOFOLD).bfloat16()
    _, latents = inputs(TWOFOLD, 9, 6)
    whole, tiled = network.decode(latents.bfloat16()), network.decode(latents.bfloat16(), 8)
    assert tiled.dtype == torch.bfloat16 and difference(tiled.float(), whole.float()) < 0.2


def reach_of(layers: list[nn.Module], window: Window, sizes: list[tuple[int, int]]) -> Window:
    """What tiling reads of the first layer's input for a window of the last one's output."""
    for layer, size in zip(reversed(layers), reversed(sizes), strict=True):
        if isinstance(layer, Attention):
            continue
        steps = 2 if isinstance(layer, ResnetBlock) else 1
        ratio = 1 + isinstance(layer, Downsample), 1 + isinstance(layer, Upsample)
        for _ in range(steps):
            window, _ = reach(window, size, *ratio)
    return window


@CONFIGS
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_rims_add_up_to_the_true_receptive_field(config, name):
    network = getattr(make_vae(config), name)
    layers = [*network.layers(), network.conv_out]
    side, middle = 36 * config.downscale, 18
    if name == "decoder":
        side, middle = 44, 22 * config.downscale + 1
    first = x = torch.randn(
        1, network.conv_in.in_channels, side, side, dtype=torch.float64, requires_grad=True
    )
    sizes = []
    for layer in layers:  # without what looks at the whole map
        if isinstance(layer, ResnetBlock):
            layer.norm1 = layer.norm2 = nn.Identity()
        sizes.append(tuple(x.shape[-2:]))
        x = x if isinstance(layer, Attention) else layer(x)
    window = Window(middle, middle + 1, middle - 1, middle + 2)
    asked = x[..., middle : middle + 1, middle - 1 : middle + 2].sum()
    seen = torch.autograd.grad(asked, first)[0].abs().sum((0, 1))
    rows, columns = (seen.sum(axis).nonzero().flatten().tolist() for axis in (1, 0))
    found = Window(rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
    assert found == reach_of(layers, window, sizes)
    assert found.left > 0 and found.right < side  # not cut off by the border


def seam(picture: Tensor, whole: Tensor, tile: int) -> float:
    """Squared differences at tile borders over those elsewhere, relative to the whole's."""

    def ratio(x: Tensor) -> Tensor:
        energy = x.diff(dim=-1).square().mean((0, 1, 2))
        border = torch.arange(1, x.shape[-1]) % tile == 0
        return energy[border].mean() / energy[~border].mean()

    return (ratio(picture) / ratio(whole)).item()


@torch.no_grad()
def test_there_are_no_seams_and_a_missing_rim_shows(monkeypatch):
    network = make_vae(EIGHTFOLD)
    pixels, latents = inputs(EIGHTFOLD, 12, 12)
    whole, moments = network.decode(latents), network.encode(pixels).mean
    assert abs(seam(network.decode(latents, 32), whole, 32) - 1) < 1e-6
    assert abs(seam(network.encode(pixels, 32).mean, moments, 4) - 1) < 1e-6

    def without_rim(window: Window, size: tuple[int, int], down: int, up: int):
        seen = Window(*(end * down // up for end in window))
        inner = Window(0, window.bottom - window.top, 0, window.right - window.left)
        return seen, inner

    monkeypatch.setattr(tiling, "reach", without_rim)
    tiled = network.decode(latents, 32)
    assert difference(tiled, whole) > 1e-2 and abs(seam(tiled, whole, 32) - 1) > 0.02
    assert difference(network.encode(pixels, 32).mean, moments) > 1e-2


def test_attention_in_parts_is_attention_at_once(generator):
    q, k, v = torch.randn(3, 1, 50, 8, generator=generator, dtype=torch.float64) * 5
    parts = [
        (a.transpose(1, 2), b.transpose(1, 2))
        for a, b in zip(k.split(7, 1), v.split(7, 1), strict=True)
    ]
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention_over(q, parts), expected)


@pytest.mark.parametrize("tile", [0, -8, 12, 16.0, True, "16"])
def test_bad_tile_is_refused(tile):
    network = make_vae(EIGHTFOLD)
    pixels, latents = inputs(EIGHTFOLD, 2, 2)
    for call, x in ((network.encode, pixels), (network.decode, latents)):
        with pytest.raises(InputError, match=r"tile is .*: expected a multiple of 8 pixels"):
            call(x, tile)


def test_a_full_disk_is_named(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tiling.FeatureMap, "_write", full)
    with pytest.raises(InputError, match="no room in .* of 8 x 8: set TMPDIR"):
        make_vae(TWOFOLD).encode(inputs(TWOFOLD, 4, 4)[0], 4)


def test_a_tile_is_chosen_only_where_the_whole_does_not_fit(monkeypatch):
    with torch.device("meta"):
        network = VAE(VAEConfig())
    monkeypatch.setattr(vae, "free_memory", lambda device: 6 * 2**30)
    assert network.tile_for(1024, 1024) is None
    assert network.tile_for(3000, 4000) == 512 == network.tile_for(1024, 1024, batch=4)
    monkeypatch.setattr(vae, "free_memory", lambda device: 2**20)
    assert network.tile_for(512, 512) is None  # a tile is as large
    monkeypatch.setattr(vae, "free_memory", lambda device: 0)  # unknown
    assert network.tile_for(3000, 4000) is None


def test_free_memory_of_the_cpu_is_plausible():
    assert 0 <= devices.free_memory(torch.device("cpu")) < 2**50


def test_an_edit_in_tiles_is_the_edit(editor, coffee, monkeypatch):
    settings = {"num_steps": 2, "seeds": 0}
    whole = editor.edit(coffee, "cartoonize the image", **settings)
    asked = []
    monkeypatch.setattr(VAE, "tile_for", lambda *args, **_: asked.append(args) or 16)
    tiled = editor.edit(coffee, "cartoonize the image", **settings)
    assert len(asked) == 2
    assert difference(tiled.latents[0], whole.latents[0]) < 1e-4
    assert difference(tiled.pixels01[0], whole.pixels01[0]) < 1e-4
