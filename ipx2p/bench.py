"""Measure how fast this machine trains. `python -m ipx2p.bench --help` shows examples."""

import argparse
import shlex
import sys

from ipx2p.cli import Parser, run_command

DESCRIPTION = "Measure how fast this machine trains, and how fast it reads pairs."
WHAT = {
    "train": "Measure training steps, with and without data.cache, in turns.",
    "data": "Measure reading pairs with several numbers of data workers, in turns.",
}
EXAMPLES = """\
Pictures are made up unless --manifest names some. All files are removed at the end. Without
--weights, `train` uses random networks in the sizes of Stable Diffusion 1.5 and needs 20 GiB of
memory. Options: python -m ipx2p.bench train --help, python -m ipx2p.bench data --help

examples:
  # Stable Diffusion 1.5, one picture a step
  python -m ipx2p.bench train

  # for a large GPU; measure many steps when data workers read ahead
  python -m ipx2p.bench train --batch-size 32 --workers 8 --turns 3 --steps 50 --compile

  # your own weights
  python -m ipx2p.bench train --weights weights/sd15-edit --resolution 512 --recompute-activations

  # a tiny model, seconds
  python -m ipx2p.bench train --weights tests/golden/diffusers --resolution 32

  # pairs a second
  python -m ipx2p.bench data

  # your own pairs
  python -m ipx2p.bench data --manifest pairs/train.jsonl --workers 4 8 16 --batches 200
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments, with the standard library alone."""
    parser = Parser(prog="python -m ipx2p.bench", description=DESCRIPTION, epilog=EXAMPLES)
    whats = parser.add_subparsers(dest="what", metavar="train|data", required=True)
    for what, add in (("train", _add_train), ("data", _add_data)):
        add(whats.add_parser(what, description=WHAT[what], help=WHAT[what]))
    return parser.parse_args(argv)


def _add_train(parser: Parser) -> None:
    add = parser.add_argument
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


def _add_data(parser: Parser) -> None:
    add = parser.add_argument
    add("--manifest", metavar="FILE", help="pairs to read (default: made up)")
    add("--workers", metavar="N", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    add("--resolution", metavar="N", type=int, default=256, help="in pixels (default: 256)")
    add("--batch-size", metavar="N", type=int, default=8, help="pairs of a batch (default: 8)")
    add("--batches", metavar="N", type=int, default=32, help="of each turn (default: 32)")
    add("--turns", metavar="N", type=int, default=5, help="of each number (default: 5)")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    typed = shlex.join(sys.argv[1:] if argv is None else argv)
    options = vars(parse(argv)) | {"command": f"python -m ipx2p.bench {typed}"}
    {"train": _train, "data": _data}[options.pop("what")](**options)


def _train(
    *,
    weights: str | None,
    resolution: int,
    workers: int,
    turns: int,
    steps: int,
    command: str,
    **how,
) -> None:
    from ipx2p.training.benchmark import benchmark_training
    from ipx2p.training.config import DataConfig, ModelConfig, RunConfig, StepsConfig, TrainConfig

    config = TrainConfig(
        run=RunConfig("bench"),
        model=ModelConfig() if weights is None else ModelConfig(weights),
        data=DataConfig(resolution=resolution, workers=workers),
        train=StepsConfig(**how),
    )
    benchmark_training(config, turns=turns, steps=steps, command=command)


def _data(**options) -> None:
    from ipx2p.data.benchmark import benchmark_loading

    benchmark_loading(**options)


if __name__ == "__main__":
    run_command(main)
