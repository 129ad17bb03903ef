"""`ipx2p COMMAND`: every command under one name (layer 6)."""

import sys

from ipx2p import __version__, experiments
from ipx2p.bench import __main__ as bench
from ipx2p.cli import Parser, run_command
from ipx2p.commands import convert, edit, train
from ipx2p.data.prepare import __main__ as prepare
from ipx2p.eval import blind, compare, evaluate, report

# The module of each command, and how it is called without `ipx2p`.
COMMANDS = {
    "edit": (edit, "sample.py"),
    "train": (train, "train.py"),
    "convert": (convert, "convert_weights.py"),
    "prepare": (prepare, "python -m ipx2p.data.prepare"),
    "compare": (compare, "python -m ipx2p.eval.compare"),
    "evaluate": (evaluate, "python -m ipx2p.eval.evaluate"),
    "report": (report, "python -m ipx2p.eval.report"),
    "blind": (blind, "python -m ipx2p.eval.blind"),
    "experiments": (experiments, "python -m ipx2p.experiments"),
    "bench": (bench, "python -m ipx2p.bench"),
}
DESCRIPTION = "Instruction-tune Stable Diffusion: picture and sentence in, edited picture out."
EPILOG = "\n".join(
    ["commands:", *(f"  {name:13}{module.DESCRIPTION}" for name, (module, _) in COMMANDS.items())]
)


def main(argv: list[str] | None = None) -> int | None:
    """Pass the other arguments to the command named by the first."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="ipx2p", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="COMMAND --help: more")
    parser.add_argument("--version", action="version", version=f"ipx2p {__version__}")
    command = parser.parse_args(argv[:1]).command
    module, script = COMMANDS[command]
    Parser.names[script] = f"ipx2p {command}"
    return module.main(argv[1:])


def run() -> None:
    """The console command."""
    run_command(main)


if __name__ == "__main__":
    run()
