"""Make data sets, and look into them. `python -m ipx2p.data.prepare --help` shows examples."""

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ipx2p.cli import Parser, run_command
from ipx2p.data.instructions import combinable
from ipx2p.errors import InputError

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
RECIPES = ("cartoonize", "restore", "combine", "import")
# As in the registries, so that --help needs no torch; a test holds them against those.
SOURCES = ("folders", "gopro", "instructpix2pix", "lol", "magicbrush", "parquet", "rain100",
           "rain13k", "rain1400", "reds", "sidd")  # fmt: skip
MULTIPLE = 8  # sides of pictures
COMBINATIONS = ("denoise+enhance", "derain+denoise", "derain+enhance", "deblur+denoise")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; needs nothing but the standard library."""
    prog = "python -m ipx2p.data.prepare"
    parser = Parser(prog=prog, description=DESCRIPTION, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", metavar="RECIPE", required=True)
    _add_cartoonize(_add_recipe(commands, "cartoonize", "photographs and their cartoons"))
    what = "photographs, each degraded in one way, to be repaired"
    _add_degraded(_add_recipe(commands, "restore", what), combinable())
    what = "photographs, degraded in several ways at once, to be repaired"
    _add_degraded(_add_recipe(commands, "combine", what), COMBINATIONS)
    _add_import(_add_recipe(commands, "import", "pairs of a published set"))
    _add_mix(_add_command(commands, "mix", "one set of several, by task"))
    for name, what in (
        ("check", "everything that is wrong with a manifest"),
        ("stats", "what is in a manifest: counts, sizes, sentences"),
    ):
        command = _add_command(commands, name, what)
        command.add_argument("manifest", metavar="MANIFEST", help="a .jsonl file or a data set")
        if name == "check":
            command.add_argument("--workers", metavar="N", type=int, default=2, help="(default: 2)")
        else:
            command.add_argument("--tokenizer", metavar="FOLDER", help="weights, to count tokens")
    sheet = _add_command(commands, "sheet", "a picture of all degradations at three severities")
    sheet.add_argument("photos", metavar="PHOTOS", help="folder of photographs")
    sheet.add_argument("output", metavar="OUTPUT.jpg")
    sheet.add_argument("--seed", metavar="N", type=int, default=0, help="(default: 0)")
    teacher = _add_command(
        commands, "teacher", "White-box weights from their TensorFlow checkpoint"
    )
    teacher.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or prefix")
    teacher.add_argument("output", metavar="OUTPUT.safetensors")
    return parser.parse_args(argv)


def _add_command(commands: argparse._SubParsersAction, name: str, what: str) -> Parser:
    return commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")


def _add_recipe(commands: argparse._SubParsersAction, name: str, what: str) -> Parser:
    """A command that makes pictures, with what all of them take."""
    parser = _add_command(commands, name, what)
    add = parser.add_argument
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
    return parser


def _add_photos(parser: Parser) -> None:
    add = parser.add_argument
    add("photos", metavar="PHOTOS", help="folder of photographs")
    add("output", metavar="OUTPUT", help="folder of the data set")
    short = f"short side of the result, a multiple of {MULTIPLE} (default: 512)"
    add("--short-side", "--size", metavar="N", type=int, default=512, help=short)
    add("--count", metavar="N", type=int, help="how many photographs to draw (default: all)")
    add("--device", metavar="NAME", default="cpu", help="auto, cpu or cuda (default: cpu)")


def _add_cartoonize(parser: Parser) -> None:
    _add_photos(parser)
    teacher = "classical, or a file: White-box weights (.safetensors), torch.export program (.pt2)"
    parser.add_argument("--teacher", metavar="NAME", default="classical", help=teacher)


def _add_degraded(parser: Parser, tasks: Iterable[str]) -> None:
    _add_photos(parser)
    undone = f"what the edit undoes (default: {' '.join(tasks)}; of an existing set, its tasks)"
    parser.add_argument("--tasks", metavar="TASK", nargs="+", help=undone)
    severities = "severities, such as noise.read=[0.01,0.02]"
    parser.add_argument("--degrade", metavar="KEY=VALUE", nargs="+", default=[], help=severities)


def _add_import(parser: Parser) -> None:
    add = parser.add_argument
    add("kind", choices=SOURCES, metavar="KIND", help=", ".join(SOURCES))
    add("folder", metavar="FOLDER", help="where the published set is")
    add("output", metavar="OUTPUT", help="folder of the data set")
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
    add("output", metavar="OUTPUT", help="folder of the new manifests")
    add("inputs", metavar="INPUT", nargs="+", help="data sets or manifests, which stay in place")
    how = parser.add_mutually_exclusive_group()
    presets = "blog: 1200 deblur, 686 derain, 8 denoise, 23 enhance; balanced: as many of each task"
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
    _check_numbers(args)
    if args.command not in RECIPES and os.environ.get("RANK", "0") != "0":
        return None  # nothing to share out: the first process does it
    commands = {"mix": _mix, "teacher": _teacher, "sheet": _sheet, "check": _check, "stats": _stats}
    return commands.get(args.command, _build)(args)


def _check_numbers(args: argparse.Namespace) -> None:
    for name, least in (("workers", 0), ("short-side", MULTIPLE), ("count", 1)):
        value = getattr(args, name.replace("-", "_"), None)
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}, expected {least} or more")


def _check_apart(folder: str, output: str) -> None:
    """A resumed run must not find its own results among its inputs."""
    if Path(output).resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(f"{output} lies inside {folder}: choose a folder outside of it")


def _build(args: argparse.Namespace) -> None:
    from ipx2p.data.prepare.builder import build
    from ipx2p.devices import pick_device
    from ipx2p.distributed import open_world

    _check_apart(args.folder if args.command == "import" else args.photos, args.output)
    with open_world(cuda=False) as world:
        if (args.short_side or 0) % MULTIPLE:
            side = round(args.short_side / MULTIPLE) * MULTIPLE
            world.print(f"--short-side {args.short_side} becomes {side}: sides are multiples of 8")
        device = pick_device(getattr(args, "device", "cpu"), world.local_rank)
        build(
            _open_recipe(args, device), Path(args.output), world=world, workers=args.workers,
            shares=args.split, on_error=args.on_error, cuda=device.type == "cuda",
        )  # fmt: skip


def _open_recipe(args: argparse.Namespace, device):
    from ipx2p.data.degradations.tasks import DEGRADATIONS, canonical_task, check_task
    from ipx2p.data.instructions import read_bank
    from ipx2p.data.prepare.dataset import stored_plan
    from ipx2p.data.prepare.recipes import Cartoonize, Import, Photos, Restore
    from ipx2p.data.published.registry import open_source

    banks = {task: read_bank(Path(file)) for task, file in _pairs(args.bank, "--bank").items()}
    common = {"banks": banks, "seed": args.seed}
    if args.command == "import":
        source = open_source(
            args.kind, Path(args.folder), task=args.task, source=args.source, target=args.target,
            pairs=args.pairs, columns=tuple(args.columns) if args.columns else None,
        )  # fmt: skip
        return Import(source, **common, licence=args.licence, size=args.short_side,
                      suffix=args.format, link=args.link)  # fmt: skip
    common["licence"] = args.licence or "as the photographs: note theirs with --licence"
    photos = Photos(Path(args.photos), args.short_side, args.count, args.format)
    if args.command == "cartoonize":
        return Cartoonize(photos, **common, teacher=args.teacher, device=device)
    stored = stored_plan(Path(args.output))
    existing = stored["settings"]["tasks"] if stored.get("recipe") == args.command else None
    everything = COMBINATIONS if args.command == "combine" else DEGRADATIONS
    chosen = args.tasks or existing or everything
    for task in chosen:
        check_task(task, "--tasks")
        if ("+" in task) != (args.command == "combine"):
            other = "combine" if "+" in task else "restore"
            raise InputError(f"--tasks: {task!r} is for the recipe {other}")
    tasks = [*dict.fromkeys(map(canonical_task, chosen))]
    config = _degrade_config(args.degrade)
    return Restore(photos, **common, name=args.command, tasks=tasks, config=config, device=device)


def _degrade_config(overrides: Sequence[str]):
    from ipx2p.config import load_config
    from ipx2p.data.degradations.tasks import DegradeConfig

    config = load_config(DegradeConfig, None, overrides)
    config.check("--degrade")
    return config


def _pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """`a=b` -> {a: b}."""
    pairs = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name and sign and value) or name in pairs:
            raise InputError(f"{option}: {text!r} is not TASK=VALUE, each task once")
        pairs[name] = value
    return pairs


def _mix(args: argparse.Namespace) -> None:
    from ipx2p.data.prepare.mix import mix

    def numbers(texts: Sequence[str] | None, option: str, kind: type) -> dict | None:
        try:
            return texts and {k: kind(v) for k, v in _pairs(texts, option).items()}
        except ValueError as error:
            raise InputError(f"{option}: {error}") from None

    mix(
        [Path(name) for name in args.inputs], Path(args.output), seed=args.seed, preset=args.preset,
        counts=numbers(args.counts, "--counts", int), licence=args.licence,
        weights=numbers(args.weights, "--weights", float), where=args.where, workers=args.workers,
    )  # fmt: skip


def _teacher(args: argparse.Namespace) -> None:
    from ipx2p.data.cartoons.whitebox import import_whitebox

    import_whitebox(Path(args.checkpoint), Path(args.output))
    print(f"{args.output}: use it as --teacher {args.output}")


def _sheet(args: argparse.Namespace) -> None:
    from ipx2p.data.degradations.sheet import SHEET_TASKS, degradation_sheet
    from ipx2p.data.degradations.tasks import DegradeConfig
    from ipx2p.data.listing import find_photos
    from ipx2p.images import load_image, save_image

    photos = [load_image(path) for path in find_photos(Path(args.photos))[: len(SHEET_TASKS)]]
    save_image(degradation_sheet(photos, DegradeConfig(), seed=args.seed), args.output)


def _check(args: argparse.Namespace) -> int:
    from ipx2p.data.prepare.check import check

    return check(Path(args.manifest), workers=args.workers)


def _stats(args: argparse.Namespace) -> None:
    from ipx2p.data.prepare.check import stats

    stats(Path(args.manifest), tokenizer=Path(args.tokenizer) if args.tokenizer else None)


if __name__ == "__main__":
    run_command(main)
