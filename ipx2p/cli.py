"""What every command shares: one-line errors, exit codes, one-line warnings (layer 0, no torch)."""

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from ipx2p.errors import InputError

BAD_INPUT = 2  # exit code, the same as argparse's own
INTERRUPTED = 130  # 128 + SIGINT, the shell's convention


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps the layout of its help and answers errors with one line."""

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: 0 or its own code, 2 with one line for bad input."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            sys.exit(main())
    except InputError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
