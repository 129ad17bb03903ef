"""The one exception that stands for bad input (layer 0, below everything else).

A caller or a file did something wrong: the message is one line that says what was expected, what
came, and what to do about it. Commands print it and exit with code 2 (`cli.py`); every other
exception is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """Bad input. The message names the file or key, what was expected, what came and the fix."""


class WriteError(InputError):
    """A file cannot be written: the disk is full, or the place is wrong."""


class NotFiniteError(InputError):
    """Numbers stopped being finite; other settings may go well."""


def suggestion(word: str, known: Sequence[str], prefix: str = "") -> str:
    """'did you mean X?' where a known word is near, then the list of all of them."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    question = f"did you mean {prefix}{nearest[0]}? " if nearest else ""
    return f"{question}known here: {', '.join(known)}"
