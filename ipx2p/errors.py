"""The one exception for bad input (layer 0, below everything else).

The message is one line that says what was expected, what was found, and what to do about it.
Commands print it and exit with code 2 (`cli.py`); every other exception is a bug of ours and keeps
its traceback.
"""

import difflib
from collections.abc import Sequence

# How a command reports bad input: the start of its line, and its exit code, the same as argparse's.
ERROR, BAD_INPUT = "error: ", 2


class InputError(ValueError):
    """Bad input. The message names the file or key, the expected and found values, and the fix."""


class WriteError(InputError):
    """A file cannot be written: the disk is full, or the place is wrong."""


class NotFiniteError(InputError):
    """Values became infinite or NaN; other settings may work."""


def suggestion(word: str, known: Sequence[str], prefix: str = "") -> str:
    """'did you mean X?' if a known word is similar, then the list of all."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    question = f"did you mean {prefix}{nearest[0]}? " if nearest else ""
    return f"{question}known here: {', '.join(known)}"
