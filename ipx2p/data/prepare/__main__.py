"""Make data sets, and look into them. `python -m ipx2p.data.prepare --help` shows examples."""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ipx2p.cli import Parser, run_command
from ipx2p.data.instructions import combinable
from ipx2p.errors import InputError
from ipx2p.names import PUBLISHED

DESCRIPTION = "Make instruction data from photographs or published sets, and look into it."
EXAMPLES = """\
Interrupted work resumes with the same command; with `torchrun --nproc-per-node 8 -m
ipx2p.data.prepare ...` eight processes share it. The result is the same, byte for byte.
docs/data.md walks through each recipe.

examples:
  # photographs and their cartoons; another teacher
  python -m ipx2p.data.prepare cartoonize photos data/cartoons
  python -m ipx2p.data.prepare cartoonize photos data/cartoons --teacher whitebox.safetensors

  # rain, noise, blur and low light to be undone; harder ones; several at once
  python -m ipx2p.data.prepare restore photos data/restore
  python -m ipx2p.data.prepare restore photos data/dark --tasks enhance \\
      --degrade low_light.stops=[4,6]
  python -m ipx2p.data.prepare combine photos data/both --tasks denoise+enhance derain+deblur

  # published sets
  python -m ipx2p.data.prepare import reds REDS data/reds
  python -m ipx2p.data.prepare import folders scans data/scans --source old --target new \\
      --task restore
  python -m ipx2p.data.prepare import folders rain data/rain --source . --target . --task derain \\
      --pairs 'rain-{}.png=norain-{}.png'
  python -m ipx2p.data.prepare import parquet magicbrush/data data/magicbrush

  # one set of many
  python -m ipx2p.data.prepare mix data/all data/reds data/rain data/cartoons --preset balanced

  # what is wrong with a manifest, and what is in it
  python -m ipx2p.data.prepare check data/all/train.jsonl
  python -m ipx2p.data.prepare stats data/all/train.jsonl
"""
MULTIPLE = 8  # sides of pictures
COMBINATIONS = ("denoise+enhance", "derain+denoise", "derain+enhance", "deblur+denoise")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; needs nothing but the standard library."""
    prog = "python -m ipx2p.data.prepare"
    parser = Parser(prog=prog, description=DESCRIPTION, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", metavar="RECIPE", required=True)

    def command(name: str, what: str, run: Callable) -> Parser:
        described = what[0].upper() + what[1:] + "."
        added = commands.add_parser(name, help=what, description=described)
        added.set_defaults(run=run)
        return added

    cartoonize = command("cartoonize", "photographs and their cartoons", _build)
    _add_photos(cartoonize)
    teacher = "classical, or a file: White-box weights (.safetensors), torch.export program (.pt2)"
    cartoonize.add_argument("--teacher", metavar="NAME", default="classical", help=teacher)
    what = "photographs, each degraded in one way, to be repaired"
    _add_degraded(command("restore", what, _build), combinable())
    what = "photographs, degraded in several ways at once, to be repaired"
    _add_degraded(command("combine", what, _build), COMBINATIONS)
    _add_import(command("import", "pairs of a published set", _build))
    _add_mix(command("mix", "one set of several, by task", _mix))
    add = command("check", "everything that is wrong with a manifest", _check).add_argument
    add("manifest", metavar="MANIFEST", type=Path, help="a .jsonl file or a data set")
    add("--workers", metavar="N", type=int, default=2, help="(default: 2)")
    add = command("stats", "what is in a manifest: counts, sizes, sentences", _stats).add_argument
    add("manifest", metavar="MANIFEST", type=Path, help="a .jsonl file or a data set")
    add("--tokenizer", metavar="FOLDER", type=Path, help="weights, to count tokens")
    add = command("sheet", "a picture of all degradations at three severities", _sheet).add_argument
    add("photos", metavar="PHOTOS", type=Path, help="folder of photographs")
    add("output", metavar="OUTPUT.jpg", type=Path)
    add("--seed", metavar="N", type=int, default=0, help="(default: 0)")
    add = command(
        "teacher", "White-box weights from their TensorFlow checkpoint", _teacher
    ).add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="folder or prefix")
    add("output", metavar="OUTPUT.safetensors", type=Path)
    return parser.parse_args(argv)


def _add_recipe(parser: Parser, inputs: str, what: str) -> None:
    """What all commands that make pictures take."""
    add = parser.add_argument
    add("folder", metavar=inputs, type=Path, help=what)
    add("output", metavar="OUTPUT", type=Path, help="folder of the data set")
    add("--seed", metavar="N", type=int, default=0, help="of all that is random (default: 0)")
    add("--workers", metavar="N", type=int, default=2, help="processes (default: 2)")
    shares = "shares of train, val and test (default: 90 5 5)"
    add("--split", metavar="SHARE", nargs=3, type=float, default=[90, 5, 5], help=shares)
    add("--instructions", help=argparse.SUPPRESS)  # moved to training
    banks = "your own sentences, one a line"
    add("--bank", metavar="TASK=FILE", nargs="+", default=[], help=banks)
    add("--format", choices=["png", "jpg"], default="png", help="of pictures (default: png)")
    bad = "if a picture or pair cannot be used (default: stop)"
    add("--on-error", choices=["stop", "skip"], default="stop", help=bad)
    add("--licence", metavar="TEXT", default="", help="a note for dataset.json")


def _add_photos(parser: Parser) -> None:
    add = parser.add_argument
    _add_recipe(parser, "PHOTOS", "folder of photographs")
    short = f"short side of the result, a multiple of {MULTIPLE} (default: 512)"
    add("--short-side", "--size", metavar="N", type=int, default=512, help=short)
    add("--count", metavar="N", type=int, help="how many photographs to draw (default: all)")
    held_out = "photographs for val, all others for train (default: by --split)"
    add("--held-out", metavar="NAME", nargs="+", default=[], help=held_out)
    add("--device", metavar="NAME", default="cpu", help="auto, cpu or cuda (default: cpu)")


def _add_degraded(parser: Parser, tasks: Iterable[str]) -> None:
    add = parser.add_argument
    _add_photos(parser)
    undone = f"what the edit undoes (default: {' '.join(tasks)}; of an existing set, its tasks)"
    add("--tasks", metavar="TASK", nargs="+", help=undone)
    severities = "severities, such as noise.read=[0.01,0.02]"
    add("--degrade", metavar="KEY=VALUE", nargs="+", default=[], help=severities)


def _add_import(parser: Parser) -> None:
    add = parser.add_argument
    add("kind", choices=PUBLISHED, metavar="KIND", help=", ".join(PUBLISHED))
    _add_recipe(parser, "FOLDER", "where the published set is")
    add("--task", metavar="NAME", help="of all pairs, where the set does not say")
    add("--source", metavar="NAME", help="of folders: the one with the pictures to edit")
    add("--target", metavar="NAME", help="of folders: the one with the edited pictures")
    pairs = "of folders: how names correspond, such as 'rain-{}.png=norain-{}.png', 'a{}=b{}', "
    pairs += "'{id}_{}.jpg={id}.jpg' for several sources of one target (default: equal names)"
    add("--pairs", metavar="SOURCE=TARGET", help=pairs)
    columns = ("SOURCE", "INSTRUCTION", "TARGET")
    add("--columns", metavar=columns, nargs=3, help="of parquet files")
    short = f"reduce larger pictures to this short side, a multiple of {MULTIPLE} (default: don't)"
    add("--short-side", "--size", metavar="N", type=int, help=short)
    add("--link", action="store_true", help="hard links instead of copies")


def _add_mix(parser: Parser) -> None:
    add = parser.add_argument
    add("output", metavar="OUTPUT", type=Path, help="folder of the new manifests")
    inputs = "data sets or manifests, which stay in place"
    add("inputs", metavar="INPUT", type=Path, nargs="+", help=inputs)
    presets = "blog: 1200 deblur, 686 derain, 8 denoise, 23 enhance; balanced: as many of each task"
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--preset", choices=["blog", "balanced"], help=presets)
    how.add_argument("--counts", metavar="TASK=N", nargs="+", help="pairs of each task")
    how.add_argument("--weights", metavar="TASK=X", nargs="+", help="shares of each task")
    where = "only pairs for which this holds, such as 'task != \"derain\" or psnr < 30'"
    add("--where", metavar="CONDITION", help=where)
    add("--workers", metavar="N", type=int, default=2, help="for --where (default: 2)")
    add("--seed", metavar="N", type=int, default=0, help="of which pairs are taken (default: 0)")
    add("--licence", metavar="TEXT", default="", help="a note for dataset.json")


def main(argv: list[str] | None = None) -> int | None:
    """Do what the command says."""
    args = parse(argv)
    if getattr(args, "instructions", None):
        raise InputError(
            "--instructions: a set holds all sentences, and training chooses among them; leave it "
            f"out here, and train with data.instructions={args.instructions}"
        )
    for name, least in (("workers", 0), ("short-side", MULTIPLE), ("count", 1)):
        value = getattr(args, name.replace("-", "_"), None)
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}, expected {least} or more")
    if args.run is not _build and os.environ.get("RANK", "0") != "0":
        return None  # nothing to share out: the first process does it
    return args.run(args)


def _build(args: argparse.Namespace) -> None:
    from ipx2p.data.prepare.builder import build
    from ipx2p.devices import pick_device
    from ipx2p.distributed import open_world

    # A resumed run must not find its own results among its inputs.
    if args.output.resolve().is_relative_to(args.folder.resolve()):
        raise InputError(f"{args.output} lies inside {args.folder}: choose a folder outside of it")
    with open_world(cuda=False) as world:
        if (args.short_side or 0) % MULTIPLE:
            side = round(args.short_side / MULTIPLE) * MULTIPLE
            world.print(f"--short-side {args.short_side} becomes {side}: sides are multiples of 8")
        device = pick_device(getattr(args, "device", "cpu"), world.local_rank)
        build(
            _open_recipe(args, device), args.output, world=world, workers=args.workers,
            shares=args.split, on_error=args.on_error, cuda=device.type == "cuda",
        )  # fmt: skip


def _open_recipe(args: argparse.Namespace, device):
    from ipx2p.config import load_config
    from ipx2p.data.degradations.tasks import DegradeConfig
    from ipx2p.data.instructions import read_bank
    from ipx2p.data.prepare.recipes import Cartoonize, Import, Restore
    from ipx2p.data.published.registry import open_source

    banks = _pairs(args.bank, "--bank", read_bank)
    common = {"banks": banks, "seed": args.seed, "size": args.short_side, "suffix": args.format}
    if args.command == "import":
        options = {name: getattr(args, name) for name in ("task", "source", "target", "pairs")}
        columns = tuple(args.columns) if args.columns else None
        source = open_source(args.kind, args.folder, **options, columns=columns)
        licence = args.licence or source.licence
        return Import(**common, licence=licence, source=source, link=args.link)
    licence = args.licence or "as the photographs: note theirs with --licence"
    common |= {"licence": licence, "folder": args.folder, "count": args.count, "device": device}
    common |= {"held_out": args.held_out}
    if args.command == "cartoonize":
        return Cartoonize(**common, teacher=args.teacher)
    tasks = _tasks(args)
    config = load_config(DegradeConfig, None, args.degrade)
    config.check("--degrade")
    return Restore(**common, name=args.command, tasks=tasks, config=config)


def _tasks(args: argparse.Namespace) -> list[str]:
    """The tasks to make pairs of: those asked for, else those of the existing set, else all."""
    from ipx2p.data.degradations.tasks import DEGRADATIONS, canonical_task
    from ipx2p.data.prepare.dataset import stored_plan

    stored = stored_plan(args.output)
    existing = (
        stored.get("settings", {}).get("tasks") if stored.get("recipe") == args.command else None
    )
    everything = COMBINATIONS if args.command == "combine" else DEGRADATIONS
    tasks = [canonical_task(task, "--tasks") for task in args.tasks or existing or everything]
    for task in tasks:
        if ("+" in task) != (args.command == "combine"):
            other = "combine" if "+" in task else "restore"
            raise InputError(f"--tasks: {task!r} is for the recipe {other}")
    return [*dict.fromkeys(tasks)]


def _pairs(texts: Sequence[str] | None, option: str, kind: Callable[[str], Any]) -> dict[str, Any]:
    """`a=b` -> {a: kind(b)}."""
    pairs = {}
    for text in texts or ():
        name, sign, value = text.partition("=")
        if not (name and sign and value) or name in pairs:
            raise InputError(f"{option}: {text!r} is not TASK=VALUE, each task once")
        try:
            pairs[name] = kind(value)
        except ValueError as error:
            raise InputError(f"{option}: {error}") from None
    return pairs


def _mix(args: argparse.Namespace) -> None:
    from ipx2p.data.prepare.mix import mix

    mix(
        args.inputs, args.output, seed=args.seed, preset=args.preset, licence=args.licence,
        counts=_pairs(args.counts, "--counts", int) or None, where=args.where,
        weights=_pairs(args.weights, "--weights", float) or None, workers=args.workers,
    )  # fmt: skip


def _teacher(args: argparse.Namespace) -> None:
    from ipx2p.data.cartoons.whitebox import import_whitebox

    import_whitebox(args.checkpoint, args.output)
    print(f"{args.output}: use it as --teacher {args.output}")


def _sheet(args: argparse.Namespace) -> None:
    from ipx2p.data.degradations.sheet import SHEET_TASKS, degradation_sheet
    from ipx2p.data.degradations.tasks import DegradeConfig
    from ipx2p.data.listing import find_photos
    from ipx2p.images import load_image, save_image

    photos = [load_image(path) for path in find_photos(args.photos)[: len(SHEET_TASKS)]]
    save_image(degradation_sheet(photos, DegradeConfig(), seed=args.seed), args.output)


def _check(args: argparse.Namespace) -> int:
    from ipx2p.data.prepare.check import check

    return check(args.manifest, workers=args.workers)


def _stats(args: argparse.Namespace) -> None:
    from ipx2p.data.prepare.check import stats

    stats(args.manifest, tokenizer=args.tokenizer)


if __name__ == "__main__":
    run_command(main)
