"""What every command shares: one-line errors, exit codes, one-line warnings (layer 0, no torch)."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import ClassVar, NoReturn

from ipx2p.errors import InputError

BAD_INPUT = 2  # exit code, the same as argparse's own
INTERRUPTED = 130  # 128 + SIGINT, the shell's convention
BROKEN_PIPE = 141  # 128 + SIGPIPE, likewise
# Read when torch starts, here and in child processes; docs/performance.md has the numbers.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads sleep; spinning, they stall a shared machine
    "THP_MEM_ALLOC_ENABLE": "1",  # large pages: a training step takes and returns gigabytes
}


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps the layout of its help and answers errors with one line."""

    names: ClassVar[dict[str, str]] = {}  # of scripts that were called as `ipx2p COMMAND`

    def __init__(self, prog: str, epilog: str = "", **kwargs) -> None:
        name = self.names.get(prog, prog)
        super().__init__(
            prog=name,
            epilog=re.sub(f"(python )?{re.escape(prog)}", name, epilog) if name != prog else epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        # Python before 3.14 takes -1e9 for an option.
        self._negative_number_matcher = re.compile(r"-(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def prepare_environment() -> None:
    """Set what torch reads when it starts, but for what the user has set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: 0 or its own code, 2 with one line for bad input.

    What the operating system refuses (names that are too long, files that may not be read) is bad
    input wherever it comes up; a bug keeps its traceback.
    """
    prepare_environment()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = main()
            sys.stdout.flush()
            sys.exit(code)
    except InputError as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever read the output has what they wanted, as with `| head`
        _drop_output()
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        name = f"{str(error.filename)[:200]}: " if error.filename else ""
        _fail(f"{name}{error.strerror or error}: name another file or folder, or free some space")
    except MemoryError:
        _fail("out of memory: use smaller pictures, a smaller resolution or smaller batches")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail(message: str) -> NoReturn:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    sys.exit(BAD_INPUT)


def _drop_output() -> None:
    """Let what cannot be written go nowhere, so that the end of the process does not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
