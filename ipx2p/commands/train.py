"""`train.py`, `ipx2p train`: train an edit model, or an autoencoder for one (layer 5)."""

import argparse
import contextlib
import io
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ipx2p.cli import Parser
from ipx2p.data.prepare import __main__ as preparation
from ipx2p.errors import InputError

if TYPE_CHECKING:
    from ipx2p.distributed import World
    from ipx2p.training.config import TrainConfig

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
    """Read the settings, make the data if it is not there, and train."""
    args = parse(argv)
    from ipx2p.config import read_settings

    read_settings(args.config, args.overrides)  # report slips before torch is imported
    from ipx2p.distributed import open_world, spread
    from ipx2p.training.config import TrainConfig

    config = TrainConfig.load(args.config, args.overrides)
    from ipx2p.commands.evaluation import check_evaluation, evaluate_run
    from ipx2p.training.loop import train
    from ipx2p.training.run import Run

    processes = config.train.num_processes
    if processes > 1 and (args.dry_run or Run(config).is_finished):
        processes = 1  # there is too little to do
    again = [sys.executable, "-m", "ipx2p", "train", *(sys.argv[1:] if argv is None else argv)]
    with spread(again, processes), open_world(cuda=config.train.uses_cuda) as world:
        if prepare_data(config, world, dry_run=args.dry_run):
            check_evaluation(config)
            train(config, dry_run=args.dry_run)
            if not args.dry_run:
                evaluate_run(config, world)


def prepare_data(config: "TrainConfig", world: "World", *, dry_run: bool = False) -> bool:
    """Run `data.prepare` if one of the manifests does not exist, unless the run is finished.

    Everything that would stop the work later is looked for first.

    Returns: whether there is data now; in a dry run nothing is made.
    """
    from ipx2p.files import check_writable
    from ipx2p.training.run import Run
    from ipx2p.weights.readers import find_folder

    data = config.data
    manifests = [data.manifest, data.validation_manifest]
    manifests += [config.evaluation.manifest] if config.evaluation else []
    manifests = [path for path in manifests if path]
    missing = world.gather([path for path in manifests if not Path(path).exists()])[0]
    if not data.prepare or not missing or world.gather(Run(config).is_finished)[0]:
        return True
    check_inputs([*map(parse_line, data.prepare)])
    find_folder(config.model.weights)
    if world.is_main:
        folder = config.run.folder.absolute()
        check_writable(next(place for place in (folder, *folder.parents) if place.exists()))
    world.print(f"{', '.join(missing)}: not there yet, to be made by data.prepare")
    for line in data.prepare:
        world.print(f"python -m ipx2p.data.prepare {line}")
        if not dry_run and preparation.main(shlex.split(line)):
            raise InputError(f"data.prepare: {line!r} found mistakes, see above")
        world.barrier()  # some lines are the work of the first process alone
    if dry_run:
        world.print("dry run: settings and weights are in order, the data can be made as above")
    return not dry_run


def parse_line(line: str) -> argparse.Namespace:
    """A line of `data.prepare` as `prepare` reads it. InputError if it does not."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return preparation.parse(shlex.split(line))
    except ValueError as error:
        raise InputError(f"data.prepare: {line!r}: {error}") from None
    except SystemExit:
        raise InputError(f"data.prepare: {line!r}: {said.getvalue().strip()}") from None


def inputs(args: argparse.Namespace) -> list[Path]:
    """The files and folders that a command of `prepare` reads."""
    single = [getattr(args, name, None) for name in ("folder", "photos", "checkpoint", "manifest")]
    teacher = getattr(args, "teacher", "classical")
    found = [*single, *getattr(args, "inputs", []), None if teacher == "classical" else teacher]
    return [Path(path) for path in found if path]


def check_inputs(commands: list[argparse.Namespace]) -> None:
    """Raise InputError for inputs of `data.prepare` that are not there and that no line makes."""
    missing: list[str] = []
    made: set[Path] = set()
    for args in commands:
        for path in inputs(args):
            if not path.exists() and made.isdisjoint((path, *path.parents)):
                missing.append(str(path))
        made.add(getattr(args, "output", None))
    if missing:
        raise InputError(
            f"data.prepare needs {', '.join(missing)}, not found: download what is missing (the "
            "head of a config file says from where), or override data.prepare with other paths"
        )
