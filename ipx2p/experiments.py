"""Answer a question by training. `python -m ipx2p.experiments --help` shows examples."""

import argparse
from pathlib import Path

from ipx2p.cli import Parser, run_command
from ipx2p.errors import InputError, suggestion

DESCRIPTION = "Answer a question by training its variants, each with several seeds."
QUESTIONS = Path(__file__).parents[1] / "configs" / "questions"
# Plain text so that --help need not read the files; a test compares it with them.
EXAMPLES = """\
questions (configs/questions/NAME.yaml; a path of your own works as well):
  data_scale     how much data is needed: nested parts of it
  longer         whether more steps help
  mixture        whether other tasks beside it help or harm a task
  held_out_task  whether a task works that was never trained
  combined       whether tasks work together that were only trained apart
  wording        whether varied sentences help with sentences that were never seen
  start          whether it pays to start from a model that can edit
  dropout        whether conditioning dropout is needed, with and without guidance

sd15/NAME is the same question at full size. Each variant and seed is a run of train.py below
OUTPUT (runs/QUESTION), and edits the same held-out pairs; OUTPUT/answer/ has table, sheet and
curve. The same command again resumes. docs/experiments.md explains how to read the table.

examples:
  python -m ipx2p.experiments data_scale

  # shorter, on two training seeds, with one process
  python -m ipx2p.experiments data_scale --seeds 0 1 --processes 1 train.steps=50

  # at full size, two runs at a time; with another training config
  python -m ipx2p.experiments sd15/data_scale --processes 2
  python -m ipx2p.experiments sd15/data_scale --config configs/restore_ip2p.yaml --output runs/ip2p
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments, with the standard library alone."""
    prog = "python -m ipx2p.experiments"
    parser = Parser(prog=prog, description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("question", metavar="QUESTION", help="a name of the list below, or a YAML file")
    keys = "settings of all trainings, or of the evaluation (evaluation.pairs=8)"
    add("overrides", metavar="key=value", nargs="*", help=keys)
    add("--config", metavar="FILE", help="the training config, instead of the question's own")
    add("--seeds", metavar="N", nargs="+", type=int, help="of training, instead of its own")
    processes = "runs at a time (default: one for each GPU, else for each core)"
    add("--processes", metavar="N", type=int, help=processes)
    add("--output", metavar="DIR", type=Path, help="(default: runs/QUESTION)")
    args = parser.parse_intermixed_args(argv)
    if args.processes is not None and args.processes < 1:
        parser.error(f"--processes is {args.processes}, expected 1 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate, and print the answer."""
    args = parse(argv)
    path, name = Path(args.question), Path(args.question).stem
    if path.suffix not in (".yaml", ".yml"):
        files = {
            str(f.relative_to(QUESTIONS).with_suffix("")): f for f in QUESTIONS.rglob("*.yaml")
        }
        name = args.question
        if name not in files:
            raise InputError(f"no question {name!r}; {suggestion(name, sorted(files))}")
        path = files[name]
    from ipx2p.config import read_settings

    read_settings(path, args.overrides)  # report slips before torch is imported
    from ipx2p.commands.questions import answer, read_question

    question = read_question(path, args.overrides, args.config, args.seeds)
    answer(question, args.output or Path("runs") / name, args.processes)


if __name__ == "__main__":
    run_command(main)
