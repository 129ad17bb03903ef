"""`train.py`, `ipx2p train`: train an edit model, or an autoencoder for one (layer 5)."""

import argparse

from ipx2p.cli import Parser

DESCRIPTION = "Train an edit model, or an autoencoder for one, as a config file says."
EXAMPLES = """\
Starting the same command again continues the run; a finished run says so.

examples:
  # a small model on the photographs of this repository, minutes on a laptop
  python train.py configs/quickstart.yaml

  # the same with other settings: any key of the config files as group.key=value
  python train.py configs/quickstart.yaml run.name=longer train.steps=2000

  # on 8 GPUs of one machine; README.md has Slurm and several machines
  torchrun --nproc-per-node 8 train.py mine.yaml

  # check settings, weights and data without training
  python train.py configs/quickstart.yaml --dry-run
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; needs nothing but the standard library."""
    parser = Parser(prog="train.py", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("config", metavar="CONFIG.yaml", help="settings of the run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read the settings and train."""
    args = parse(argv)
    from ipx2p.training.config import TrainConfig
    from ipx2p.training.loop import train

    train(TrainConfig.load(args.config, args.overrides), dry_run=args.dry_run)
