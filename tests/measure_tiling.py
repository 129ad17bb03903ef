"""Time and peak memory of the autoencoder, whole or in tiles: a process for each measurement.

    python tests/measure_tiling.py decode --size 1024x1024 --tile 512

Random weights, one random picture. `rise` is what the peak of the process rose by above weights,
input and libraries; tiles' files are not part of it. `--widths 16,16,16,16` makes a narrow network.
"""

import argparse
import time

import torch

from ipx2p.devices import memory_bytes
from ipx2p.models.vae import VAE, VAEConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("direction", choices=["encode", "decode"])
    parser.add_argument("--size", default="512x512", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--tile", type=int, help="pixels; without it the picture as a whole")
    parser.add_argument("--widths", default="128,256,512,512", help="block_out_channels")
    parser.add_argument("--layers", type=int, default=2, help="layers_per_block")
    args = parser.parse_args()
    widths = [int(width) for width in args.widths.split(",")]
    config = VAEConfig(
        block_out_channels=widths,
        layers_per_block=args.layers,
        norm_num_groups=min(32, widths[0]),
    )
    vae = VAE(config)
    width, height = map(int, args.size.split("x"))
    pixels, latents = torch.rand(1, 3, height, width), None
    if args.direction == "decode":
        latents = torch.randn(1, 4, height // config.downscale, width // config.downscale)
        pixels = None
    before, started_at = memory_bytes(vae.device), time.perf_counter()
    cpu_before_s = time.process_time()
    with torch.no_grad():
        vae.encode(pixels, args.tile) if latents is None else vae.decode(latents, args.tile)
    elapsed_s, rise = time.perf_counter() - started_at, memory_bytes(vae.device) - before
    cpu_s = time.process_time() - cpu_before_s
    print(
        f"{args.direction} {args.size} tile {args.tile} widths {args.widths}: {elapsed_s:.1f} s, "
        f"cpu {cpu_s:.1f} s, "
        f"peak {(before + rise) / 2**30:.2f} GiB, rise {rise / 2**30:.2f} GiB, "
        f"{rise / (4 * width * height):.0f} float32 values a pixel"
    )


if __name__ == "__main__":
    main()
