"""What each optimisation is worth: with it and without, in turns, in the sizes of Stable Diffusion.

    python tests/compare_optimisations.py [--turns 5]

Needs 16 GiB of memory.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ipx2p.bench.made_up import write_weights
from ipx2p.bench.turns import Way, Work, measure
from ipx2p.distributed import World
from ipx2p.editing.editor import Editor
from ipx2p.models import blocks
from ipx2p.training.config import StepsConfig
from ipx2p.training.speed import set_layout


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="With and without each optimisation, in turns.")
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), World())
        editor = Editor.load(folder, device="cpu")

    def compare(about: str, ways: dict[str, Way]) -> None:
        next(iter(ways.values())).run()
        work = Work("optimisation", about, 1, "calls", ways, editor.device)
        measure(work, turns=turns, command=f"python tests/compare_optimisations.py --turns {turns}")

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
