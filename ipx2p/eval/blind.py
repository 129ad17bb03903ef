"""Judge edits by eye, blinded. `python -m ipx2p.eval.blind --help` shows examples."""

import argparse
from pathlib import Path

from ipx2p.cli import Parser, run_command

DESCRIPTION = "Judge edits by eye without knowing whose they are, and count the choices."
EXAMPLES = """\
A page shows two edits of one picture at a time, on sides that are drawn at random. It is one file
that opens from disk and holds no names: send OUTPUT/page.html, keep OUTPUT/key.json, which says
what was on which side. People send back the choices.json that the page saves.

examples:
  # all lines of the table of one or more runs of compare or evaluate, each two of them
  python -m ipx2p.eval.blind make evaluation --output blind

  # two of them, 60 pairs
  python -m ipx2p.eval.blind make evaluation --models mine theirs --limit 60 --output blind

  # the table of preferences: blind/preferences.md and .csv
  python -m ipx2p.eval.blind read blind/key.json choices_ann.json choices_ben.json
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments, with the standard library alone."""
    parser = Parser(prog="python -m ipx2p.eval.blind", description=DESCRIPTION, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="make|read")
    make = commands.add_parser("make", help="write a page and its key")
    add = make.add_argument
    add("folders", metavar="FOLDER", nargs="+", type=Path, help="--output of compare or evaluate")
    add("--output", metavar="DIR", type=Path, default=Path("blind"), help="(default: blind)")
    which = "labels or models of the table (default: all but identity, oracle, vae, classical)"
    add("--models", metavar="NAME", nargs="+", default=[], help=which)
    add("--limit", metavar="N", type=int, help="at most N pairs, drawn from all")
    add("--seed", metavar="N", type=int, default=0, help="of order and sides (default: 0)")
    asked = "(default: Which is the better edit?)"
    add("--question", metavar="TEXT", default="Which is the better edit?", help=asked)
    read = commands.add_parser("read", help="count choices")
    add = read.add_argument
    add("key", metavar="KEY", type=Path, help="key.json of the page")
    add("choices", metavar="CHOICES", nargs="+", type=Path, help="choices.json, one of each person")
    add("--output", metavar="DIR", type=Path, help="(default: the folder of the key)")
    args = parser.parse_args(argv)
    if args.command == "make" and args.limit is not None and args.limit < 1:
        parser.error(f"--limit is {args.limit}, expected 1 or more pairs")
    return args


def main(argv: list[str] | None = None) -> None:
    """Write the page, or the table, and print where it is."""
    args = parse(argv)
    _make(args) if args.command == "make" else _read(args)


def _make(args: argparse.Namespace) -> None:
    from ipx2p.eval.records import read_folders
    from ipx2p.eval.side_by_side import KEY, PAGE, find_pairs, write_page

    pairs = find_pairs(read_folders(args.folders), args.models)
    how = {"question": args.question, "seed": args.seed, "limit": args.limit}
    counts = write_page(pairs, args.output, **how)
    left_out = {
        "identical": "with identical edits",
        "failed": "with an edit that is not finite",
        "more": "beyond --limit",
    }
    said = [f"{counts[name]} {reason}" for name, reason in left_out.items() if counts[name]]
    print("; left out: ".join([f"{counts['pairs']} pairs", *([", ".join(said)] if said else [])]))
    print(f"send  {args.output / PAGE}")
    print(f"keep  {args.output / KEY}")


def _read(args: argparse.Namespace) -> None:
    from ipx2p.eval.side_by_side import preference_table, read_choices
    from ipx2p.files import atomic_write, read_json

    choices, output = read_choices(args.key, args.choices), args.output or args.key.parent
    question = str(read_json(args.key).get("question", ""))
    text, table = preference_table(choices, question)
    for suffix, content in (("md", text), ("csv", table)):
        with atomic_write(output / f"preferences.{suffix}") as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(text, end="")
    print(f"\n{output / 'preferences.md'}")


if __name__ == "__main__":
    run_command(main)
