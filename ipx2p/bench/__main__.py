"""Measure speed and memory. `python -m ipx2p.bench --help` shows examples."""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from ipx2p.cli import Parser, run_command

DESCRIPTION = "Measure speed and memory on this machine, beside other settings or diffusers."
WHAT = {
    "unet": "Measure the forward pass of the U-Net.",
    "edit": "Measure a whole edit: encode, sample with three branches, decode.",
    "train": "Measure training steps with data.cache, beside encoding pictures at each step.",
    "data": "Measure reading pairs with several numbers of data workers.",
    "load": "Measure a process from its start to the end of the first step of an edit.",
    "table": "Print the records of --record as a table, or write it into a page.",
}
EXAMPLES = """\
The ways to do the work take turns, and ratios are within turns: below 1, the first way takes less.
Pictures are made up unless --manifest names some, and so are weights without --weights, in the
sizes of Stable Diffusion 1.5 (a file of 4.3 GB, removed at the end; training needs 20 GiB of
memory). `--against diffusers` does the same work with diffusers, on the same weights in memory.
Options: python -m ipx2p.bench train --help, and so on

examples:
  # Stable Diffusion 1.5: an edit at 256 pixels, beside diffusers
  python -m ipx2p.bench edit --against diffusers

  # training steps for a large GPU; measure many steps when data workers read ahead
  python -m ipx2p.bench train --batch-size 32 --workers 8 --turns 3 --steps 50 --compile

  # your own weights
  python -m ipx2p.bench train --weights weights/sd15-edit --resolution 512 --recompute-activations

  # a tiny model, seconds
  python -m ipx2p.bench edit --weights assets/tiny --resolution 128

  # pairs a second, of your own pairs
  python -m ipx2p.bench data --manifest pairs/train.jsonl --workers 4 8 16 --batches 200

  # which operators take the time
  python -m ipx2p.bench unet --profile traces

  # keep the results, and write the table of docs/performance.md
  python -m ipx2p.bench unet --against diffusers --record docs/bench.jsonl
  python -m ipx2p.bench table docs/bench.jsonl --into docs/performance.md
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments, with the standard library alone."""
    parser = Parser(prog="python -m ipx2p.bench", description=DESCRIPTION, epilog=EXAMPLES)
    names = "|".join(WHAT)
    whats = parser.add_subparsers(dest="what", metavar=names, required=True)
    adders = {"unet": _add_unet, "edit": _add_edit, "train": _add_train, "data": _add_data}
    for what, description in WHAT.items():
        sub = whats.add_parser(what, description=description, help=description)
        if what == "table":
            sub.add_argument("record", metavar="FILE", type=Path, help="of --record")
            sub.add_argument("--into", metavar="PAGE", type=Path, help="a page with the marks")
            continue
        adders.get(what, lambda _: None)(sub)
        if what != "data":
            _add_model(sub)
        add = sub.add_argument
        add("--turns", metavar="N", type=int, default=5, help="of each way (default: 5)")
        add("--record", metavar="FILE", type=Path, help="append the result to these JSON lines")
        add("--profile", metavar="FOLDER", type=Path, help="trace each way once, after the turns")
    return parser.parse_args(argv)


def _add_model(parser: Parser) -> None:
    add = parser.add_argument
    add("--weights", metavar="FOLDER", help="weights folder or hub id (default: random weights)")
    add("--device", metavar="NAME", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--against", choices=["diffusers"], help="does the same work beside it")


def _add_unet(parser: Parser) -> None:
    _add_inference(parser)
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=3, help="rows, such as branches (default: 3)"
    )


def _add_edit(parser: Parser) -> None:
    _add_inference(parser)
    parser.add_argument("--steps", metavar="N", type=int, default=4, help="(default: 4)")


def _add_inference(parser: Parser) -> None:
    add = parser.add_argument
    add("--resolution", metavar="N", type=int, default=256, help="in pixels (default: 256)")
    add("--dtype", metavar="NAME", default="auto", help="auto, float32, bfloat16 or float16")
    add("--compile", action="store_true", help="compile the U-Net")


def _add_train(parser: Parser) -> None:
    add = parser.add_argument
    add("--resolution", metavar="N", type=int, default=256, help="in pixels (default: 256)")
    add("--batch-size", metavar="N", type=int, default=1, help="samples of a step (default: 1)")
    add("--accumulate", metavar="N", type=int, default=1, help="micro-batches (default: 1)")
    add("--steps", metavar="N", type=int, default=1, help="measured in each turn (default: 1)")
    add("--workers", metavar="N", type=int, default=0, help="that load data (default: 0)")
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
    add("--against", choices=["datasets"], help="reads the same pairs beside it")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    typed = shlex.join(sys.argv[1:] if argv is None else argv)
    options = vars(parse(argv))
    what = options.pop("what")
    if what == "table":
        from ipx2p.bench.turns import write_table

        write_table(options["record"], options["into"])
        return
    _check_counts(options)

    from ipx2p.bench import works
    from ipx2p.bench.turns import append, measure
    from ipx2p.devices import pick_device
    from ipx2p.distributed import open_world

    turns, record, traces = (options.pop(name) for name in ("turns", "record", "profile"))
    on_cuda = pick_device(options.get("device", "cpu")).type == "cuda"
    with (
        open_world(cuda=on_cuda) as world,
        tempfile.TemporaryDirectory(prefix="ipx2p-bench-", ignore_cleanup_errors=True) as own,
    ):
        options["folder"] = Path(world.gather(own)[0])  # for all processes of this machine
        if what == "train":
            options["world"] = world
        work = getattr(works, what)(**options)
        command = f"python -m ipx2p.bench {typed}"
        result = measure(work, turns=turns, command=command, world=world, folder=traces)
        if record is not None and world.is_main:
            append(result, record)
        world.barrier()  # no process needs the folder any more


def _check_counts(options: dict) -> None:
    from ipx2p.errors import InputError

    for name in {"turns", "resolution", "batch_size", "batches", "steps", "accumulate"} & {
        *options
    }:
        if options[name] < 1:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is {options[name]}, expected 1 or more")


if __name__ == "__main__":
    run_command(main)
