"""What each optimisation is worth: with it and without, in turns, in the sizes of Stable Diffusion.

First of single layers, where a call is ten of them, then of the whole networks.

    python tests/compare_optimisations.py [--turns 5]

Needs 16 GiB of memory.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ipx2p.bench.made_up import write_weights
from ipx2p.bench.turns import Way, Work, measure
from ipx2p.distributed import World
from ipx2p.editing.editor import Editor
from ipx2p.models import blocks
from ipx2p.training.config import StepsConfig
from ipx2p.training.speed import set_layout

# Rows, channels, channels of the result, side of the feature map.
CONVOLUTIONS = [
    (1, 2560, 1280, 4),
    (1, 2560, 1280, 8),
    (1, 1280, 1280, 8),
    (3, 2560, 1280, 4),
    (3, 2560, 1280, 8),
    (3, 1280, 1280, 8),
    (3, 640, 1280, 8),
    (3, 1920, 640, 16),
]
ENLARGED = [(1, 512, 64), (1, 256, 128), (3, 640, 16), (3, 1280, 8)]


def without(name: str, run: Callable[[], None], off: float = math.inf) -> Way:
    """The same call with an optimisation switched off, by default by a threshold that no feature
    map reaches."""

    def call() -> None:
        kept = getattr(blocks, name)
        setattr(blocks, name, off)
        try:
            run()
        finally:
            setattr(blocks, name, kept)

    return Way(call)


Compare = Callable[[str, dict[str, Way]], None]


def ten_times(run: Callable[[Tensor], Tensor], x: Tensor) -> Way:
    """Ten calls without gradients."""

    @torch.no_grad()
    def call() -> None:
        for _ in range(10):
            run(x)

    return Way(call)


def compare_layers(compare: Compare) -> None:
    """Single layers of the U-Net and of the decoder."""
    for rows, channels, out_channels, side in CONVOLUTIONS:
        layer, x = blocks.Conv3x3(channels, out_channels), torch.randn(rows, channels, side, side)
        about = f"{channels} -> {out_channels} channels, {side} x {side}, {rows} rows"
        ratio = layer.weight.numel() / x.numel()
        convolution = nn.Conv2d.forward.__get__(layer)
        ways = {"matrix product": ten_times(layer.as_product, x)}
        ways["convolution"] = ten_times(convolution, x)
        compare(f"{about}, ratio {ratio:.0f}", ways)
    for rows, channels, side in ENLARGED:
        layer, x = blocks.Upsample(channels), torch.randn(rows, channels, side, side)
        enlarged_first = nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2), layer.conv)
        ways = {"in phases": ten_times(layer.in_phases, x)}
        ways["enlarged first"] = ten_times(enlarged_first, x)
        compare(f"{channels} channels, {side} -> {2 * side} pixels, {rows} rows", ways)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="With and without each optimisation, in turns.")
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns

    def compare(about: str, ways: dict[str, Way]) -> None:
        next(iter(ways.values())).run()
        work = Work("optimisation", about, 1, "calls", ways, torch.device("cpu"))
        measure(work, turns=turns, command=f"python tests/compare_optimisations.py --turns {turns}")

    compare_layers(compare)
    compare_networks(compare)


def compare_networks(compare: Compare) -> None:
    """The whole U-Net, its training, and the decoder."""
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), World())
        editor = Editor.load(folder, device="cpu")

    unet, vae = editor.unet, editor.vae
    latents, text = torch.randn(3, 4, 32, 32), torch.randn(3, 77, 768)
    timesteps = torch.full((3,), 500.0)
    projected = torch.no_grad()(unet.project_text)(text)

    @torch.no_grad()
    def forward(shown: object = text) -> None:
        unet(latents, timesteps, shown, latents)

    @torch.no_grad()
    def decode() -> None:
        vae.decode(latents[:1])

    compare(
        "U-Net forward, 3 rows, 256 px",
        {
            "with": Way(forward),
            "without matrix products": without("PRODUCT_RATIO", forward),
            "linear layers by MKL": without("HAS_MKL", forward, off=False),
        },
    )
    compare(
        "U-Net forward, 3 rows, 256 px",
        {"text projected before": Way(lambda: forward(projected)), "at each call": Way(forward)},
    )
    compare(
        "autoencoder, decode 256 px",
        {"with": Way(decode), "without phases": without("PHASE_PIXELS", decode)},
    )
    set_layout(unet.train().requires_grad_(True), StepsConfig(steps=1))

    def step() -> None:
        unet(latents[:1], timesteps[:1], text[:1], latents[:1]).square().mean().backward()
        unet.zero_grad(set_to_none=True)

    compare(
        "U-Net forward and backward, 1 row, 256 px",
        {"with": Way(step), "without matrix products": without("PRODUCT_RATIO", step)},
    )


if __name__ == "__main__":
    main()
