"""Report finished runs again. `python -m ipx2p.eval.report --help` shows examples."""

import argparse
from pathlib import Path

from ipx2p.cli import Parser, add_shown, run_command
from ipx2p.errors import InputError

DESCRIPTION = "Make the report of finished comparisons again, of one folder or of several together."

EXAMPLES = """\
FOLDER: the --output of compare or evaluate. Its records and pictures are enough: weights, manifest
and photographs may be gone, and the folder may have been moved. Cases that several
folders share are compared; scores must have been measured in the same way, and at equal sizes.

examples:
  # the tables, curves and pictures of a run, in its folder
  python -m ipx2p.eval.report evaluation

  # what a judge answered to the requests of a benchmark that is judged
  python -m ipx2p.eval.report evaluation --answers answers.jsonl

  # two runs, of one machine each; differences from a model of the first
  python -m ipx2p.eval.report runs/here runs/there --output together --baseline old
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments, with the standard library alone."""
    parser = Parser(prog="python -m ipx2p.eval.report", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("folders", metavar="FOLDER", nargs="+", type=Path, help="output of compare or evaluate")
    where = "(default: FOLDER, if there is one)"
    add("--output", metavar="DIR", type=Path, help=where)
    answers = "a judge's answers to requests.jsonl: its scores are kept, and reported"
    add("--answers", metavar="FILE", type=Path, help=answers)
    add_shown(add)
    args = parser.parse_args(argv)
    if args.output is None and len(args.folders) > 1:
        parser.error("--output is required with several folders")
    if args.answers is not None and len(args.folders) > 1:
        parser.error("--answers belong to one folder: report it first, then all of them together")
    if args.grids < 0:
        parser.error(f"--grids is {args.grids}, expected 0 or more pictures")
    return args


def main(argv: list[str] | None = None) -> None:
    """Report, and print where."""
    args = parse(argv)
    for folder in args.folders:
        if not folder.is_dir():
            raise InputError(
                f"{folder} is not a folder: expected the --output of compare or evaluate"
            )
    from ipx2p.eval.benchmarks.judged import add_answers
    from ipx2p.eval.records import read_folders
    from ipx2p.eval.reporting import write_report
    from ipx2p.files import check_writable

    if args.answers is not None:
        add_answers(args.answers, args.folders[0])
    records = read_folders(args.folders)
    output = args.output or args.folders[0]
    check_writable(output)
    there = {path.name for path in output.iterdir()}
    if there and not {"edits.csv", "table.tex"} <= there and output not in args.folders:
        raise InputError(f"{output} holds other files, and no report: choose another --output")
    print(*write_report(output, records, args.baseline, args.grids), sep="\n")


if __name__ == "__main__":
    run_command(main)
