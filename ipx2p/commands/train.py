"""`train.py`, `ipx2p train`: train an edit model, or an autoencoder for one (layer 5)."""

import argparse
import os
from pathlib import Path

from ipx2p.cli import Parser

DESCRIPTION = "Train an edit model, or an autoencoder for one, as a config file says."
EXAMPLES = """\
Run the same command again to resume; a finished run says so.

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
    """Parse the arguments, with the standard library alone."""
    parser = Parser(prog="train.py", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="settings of the run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    args = parser.parse_intermixed_args(argv)
    if args.config is None:
        known = sorted(map(os.path.relpath, Path(__file__).parents[2].glob("configs/*.yaml")))
        parser.error(f"name the settings of the run, CONFIG.yaml: {', '.join(known)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Read the settings and train."""
    args = parse(argv)
    from ipx2p.config import read_settings

    read_settings(args.config, args.overrides)  # report slips before torch is imported
    from ipx2p.training.config import TrainConfig

    config = TrainConfig.load(args.config, args.overrides)
    from ipx2p.training.loop import train

    train(config, dry_run=args.dry_run)
