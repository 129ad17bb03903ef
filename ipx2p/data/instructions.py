"""Instructions for each task: banks of sentences, and a grammar for several tasks (layer 2).

A bank is a text file, `banks/TASK.txt`, one sentence per line. The first is the fixed sentence, the
one of "Instruction-tuning Stable Diffusion with InstructPix2Pix" (Hugging Face, 2023). Lines
`first | later` hold phrases for tasks joined by "+": what to say when the task comes first in a
sentence of `banks/patterns.txt`, and when it comes later.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from pathlib import Path

from ipx2p.errors import InputError, suggestion

# Always the first sentence of a bank, one drawn once per pair, or one drawn at each training step.
POLICIES = ("fixed", "per_pair", "per_step")
BANK_SIZE = 60  # sentences for a combination of tasks

_FOLDER = Path(__file__).parent / "banks"
_PATTERNS = _FOLDER / "patterns.txt"


@cache
def bank(task: str) -> tuple[str, ...]:
    """All sentences for a task, or for several joined by "+" in any order; the fixed one first.

    Raises: InputError for a task without a bank.
    """
    parts = task.split("+")
    if len(parts) > 1:
        return _combined(parts)
    tasks = sorted(path.stem for path in _FOLDER.glob("*.txt") if path != _PATTERNS)
    if task not in tasks:
        raise InputError(f"no instructions for task {task!r}; {suggestion(task, tasks)}")
    return tuple(line for line in read_bank(_FOLDER / f"{task}.txt") if "|" not in line)


def has_bank(task: str) -> bool:
    """Whether `bank` knows the task."""
    try:
        bank(task)
    except InputError:
        return False
    return True


def read_bank(path: str | Path) -> tuple[str, ...]:
    """Sentences of a text file: UTF-8, one per line, the fixed one first, blank lines skipped.

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
        raise InputError(f"{path} line 1: no instructions, expected one sentence per line")
    return sentences


@cache
def combinable() -> dict[str, list[tuple[str, ...]]]:
    """The phrases (as first part, as later part) of each task that can be combined, by name."""
    phrases = {
        path.stem: [tuple(line.split(" | ")) for line in read_bank(path) if "|" in line]
        for path in sorted(_FOLDER.glob("*.txt"))
    }
    return {task: parts for task, parts in phrases.items() if parts}


def _combined(tasks: Sequence[str]) -> tuple[str, ...]:
    """Sentences for several tasks: `BANK_SIZE` of all that can be made, evenly spaced.

    They are listed by order of the tasks, then by pattern, then by phrases, and taken in strides of
    the golden ratio: any number of such places is spread evenly over the list (Weyl).
    """
    from ipx2p.data.degradations.tasks import DEGRADATIONS  # with torch, which --help must not need

    parts = combinable()
    where = f"no instructions for task {'+'.join(tasks)!r}"
    for task in tasks:
        if task not in parts:
            raise InputError(f"{where}: no phrases for {task!r}; {suggestion(task, [*parts])}")
    if len({*tasks}) < len(tasks):
        raise InputError(f"{where}: a task appears twice, name each once")
    patterns = [line for line in read_bank(_PATTERNS) if line.count("{}") == len(tasks)]
    if not patterns:
        raise InputError(f"{where}: {len(tasks)} tasks, patterns.txt has none for so many")
    choices = []
    for first, *later in permutations(sorted(tasks, key=[*DEGRADATIONS].index)):
        firsts = [phrase for phrase, _ in parts[first]]
        laters = [[phrase for _, phrase in parts[task]] for task in later]
        choices += product(patterns, firsts, *laters)
    stride = round(len(choices) * (math.sqrt(5) - 1) / 2)
    while math.gcd(stride, len(choices)) > 1:
        stride += 1
    places = [index * stride % len(choices) for index in range(min(BANK_SIZE, len(choices)))]
    return tuple(pattern.format(*phrases) for pattern, *phrases in (choices[i] for i in places))
