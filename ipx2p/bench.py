"""Measure how fast this machine trains. `python -m ipx2p.bench --help` shows examples."""

import argparse
import os
import shlex
import sys

from ipx2p.cli import Parser, run_command

DESCRIPTION = "Measure training steps, with and without data.cache, in turns."
EXAMPLES = """\
Pictures are made up. Without --weights the networks have the sizes of Stable Diffusion 1.5 and
random weights, which needs 20 GiB of memory. Whatever is written is removed at the end.

examples:
  # Stable Diffusion 1.5, one picture a step
  python -m ipx2p.bench train

  # as on a large GPU; with data workers, measure many steps: they read ahead
  python -m ipx2p.bench train --batch-size 32 --workers 8 --turns 3 --steps 50 --compile

  # your own weights
  python -m ipx2p.bench train --weights weights/sd15-edit --resolution 512 --recompute-activations

  # a tiny model, seconds
  python -m ipx2p.bench train --weights tests/golden/diffusers --resolution 32
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; needs nothing but the standard library."""
    parser = Parser(prog="python -m ipx2p.bench", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("what", choices=["train"], help="what to measure")
    add("--weights", metavar="FOLDER", help="weights folder or hub id (default: random weights)")
    add("--resolution", metavar="N", type=int, default=256, help="in pixels (default: 256)")
    add("--batch-size", metavar="N", type=int, default=1, help="samples of a step (default: 1)")
    add("--accumulate", metavar="N", type=int, default=1, help="micro-batches (default: 1)")
    add("--turns", metavar="N", type=int, default=5, help="of each kind (default: 5)")
    add("--steps", metavar="N", type=int, default=1, help="measured in each turn (default: 1)")
    add("--workers", metavar="N", type=int, default=0, help="that load data (default: 0)")
    add("--device", metavar="NAME", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--precision", metavar="NAME", default="auto", help="auto, float32 or bfloat16")
    add("--compile", action="store_true", help="compile the U-Net")
    add("--recompute-activations", action="store_true", help="less memory, slower steps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    # Large pages on the CPU, read when torch starts: a step takes and gives back gigabytes.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from ipx2p.training.benchmark import benchmark_training
    from ipx2p.training.config import DataConfig, ModelConfig, RunConfig, StepsConfig, TrainConfig

    config = TrainConfig(
        run=RunConfig("bench"),
        model=ModelConfig() if args.weights is None else ModelConfig(args.weights),
        data=DataConfig(resolution=args.resolution, workers=args.workers),
        train=StepsConfig(
            batch_size=args.batch_size,
            accumulate=args.accumulate,
            device=args.device,
            precision=args.precision,
            compile=args.compile,
            recompute_activations=args.recompute_activations,
        ),
    )
    typed = shlex.join(sys.argv[1:] if argv is None else argv)
    benchmark_training(
        config, turns=args.turns, steps=args.steps, command=f"python -m ipx2p.bench {typed}"
    )


if __name__ == "__main__":
    run_command(main)
