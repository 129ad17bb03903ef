"""What to say for each task: banks of sentences, and a grammar for several tasks (layer 2).

A bank is a text file, `banks/TASK.txt`, one sentence a line. Its first line is the fixed sentence:
the one of "Instruction-tuning Stable Diffusion with InstructPix2Pix" (Hugging Face, 2023). Tasks
joined by "+" have no file; their sentences are put together from the parts in `banks/phrases.txt`.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from pathlib import Path

from ipx2p.errors import InputError, suggestion

# When a pair gets its sentence: the first of its bank, one drawn once for each pair, or one drawn
# at each training step.
POLICIES = ("fixed", "per_pair", "per_step")
BANK_SIZE = 60  # sentences for a combination of tasks

_FOLDER = Path(__file__).parent / "banks"
_PHRASES = _FOLDER / "phrases.txt"


@cache
def bank(task: str) -> tuple[str, ...]:
    """All sentences for a task, or for several joined by "+" in any order; the fixed one first.

    Raises: InputError for a task without a bank.
    """
    parts = task.split("+")
    if len(parts) > 1:
        return _combined(parts)
    if task not in _single_tasks():
        raise InputError(f"no instructions for task {task!r}; {suggestion(task, _single_tasks())}")
    return read_bank(_FOLDER / f"{task}.txt")


def has_bank(task: str) -> bool:
    """Whether `bank` knows the task."""
    try:
        bank(task)
    except InputError:
        return False
    return True


def read_bank(path: str | Path) -> tuple[str, ...]:
    """Sentences of a text file: UTF-8, one a line, the fixed one first, blank lines skipped.

    Raises: InputError that names the file, and the line that is not UTF-8.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read instructions {path}: {error.strerror}") from error
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} line {line} is not UTF-8: save the file as UTF-8") from error
    sentences = tuple(line.strip() for line in lines if line.strip())
    if not sentences:
        raise InputError(f"{path} line 1: no instructions, expected one sentence a line")
    return sentences


@cache
def _single_tasks() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.txt") if path != _PHRASES))


@cache
def _phrases() -> tuple[dict[str, list[tuple[str, str]]], dict[int, list[str]]]:
    """The table: (as first part, as later part) by task; patterns by the number of their parts."""
    parts, patterns = {}, {}
    for line in read_bank(_PHRASES):
        if line.startswith("+"):
            patterns.setdefault(line.count("{}"), []).append(line.removeprefix("+").strip())
        elif not line.startswith("#"):
            task, first, later = (text.strip() for text in line.split("|"))
            parts.setdefault(task, []).append((first, later))
    return parts, patterns


def _combined(tasks: Sequence[str]) -> tuple[str, ...]:
    """Sentences for several tasks: `BANK_SIZE` of all that can be made, evenly taken.

    They are listed by order of the tasks, then by pattern, then by phrases, and taken in strides of
    the golden ratio: any number of such places is spread evenly over the list (Weyl).
    """
    parts, patterns = _phrases()
    where = f"no instructions for task {'+'.join(tasks)!r}"
    for task in tasks:
        if task not in parts:
            raise InputError(f"{where}: no phrases for {task!r}; {suggestion(task, [*parts])}")
    if len({*tasks}) < len(tasks):
        raise InputError(f"{where}: a task stands in it twice, name each once")
    if len(tasks) not in patterns:
        raise InputError(f"{where}: {len(tasks)} tasks, expected {min(patterns)}-{max(patterns)}")
    choices = []
    for first, *later in permutations(sorted(tasks, key=[*parts].index)):
        firsts = [phrase for phrase, _ in parts[first]]
        laters = [[phrase for _, phrase in parts[task]] for task in later]
        choices += product(patterns[len(tasks)], firsts, *laters)
    stride = round(len(choices) * (math.sqrt(5) - 1) / 2)
    while math.gcd(stride, len(choices)) > 1:
        stride += 1
    places = [index * stride % len(choices) for index in range(min(BANK_SIZE, len(choices)))]
    return tuple(pattern.format(*phrases) for pattern, *phrases in (choices[i] for i in places))
