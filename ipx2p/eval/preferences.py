"""What people chose on side-by-side pages, as a table of preferences with intervals (layer 4).

Of two lines the share of the choices for the first is estimated among those that are not ties. If
each picture was judged once, choices are independent and the interval is Wilson's (1927). Choices
of several people, seeds or tasks on one picture are not: pictures are drawn, see `intervals`. Where
that gives no interval (few pictures, or nearly all alike), it is Wilson's with as many choices as
there are pictures, which is wide rather than wrong.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ipx2p.errors import InputError
from ipx2p.eval.intervals import Estimate, estimates, share
from ipx2p.eval.records import key_of
from ipx2p.files import csv_text, digest_file, read_json

CHOICES = ("left", "tie", "right")
COLUMNS = (
    *("task", "first", "second", "pictures", "choices", "wins", "ties", "losses"),
    *("share", "low", "high", "preferred"),
)
HOW = (
    "Wins are choices of the first. The share of wins is among choices that are not ties, with its "
    "95 % interval: over pictures where several choices are about one picture, else Wilson's. A "
    "line is preferred where the interval is on one side of 50 %."
)


@dataclass(frozen=True)
class Choice:
    """One judgement of a pair of the page.

    chosen: the label that was preferred, None for a tie. lines: both labels, as in the table.
    picture: equal for choices about one photograph.
    """

    rater: str
    pair: int
    side: str
    chosen: str | None
    lines: tuple[str, str]
    picture: str
    task: str


@dataclass(frozen=True)
class Preference:
    """How two lines compare: counts of choices, and the share of the first without ties."""

    task: str
    first: str
    second: str
    pictures: int
    wins: int
    ties: int
    losses: int
    share: Estimate

    @property
    def preferred(self) -> str:
        """The line that is preferred, "" if the choices do not show one."""
        if self.share.low is None or self.share.low <= 0.5 <= self.share.high:
            return ""
        return self.first if self.share.mean > 0.5 else self.second


def read_choices(key_file: Path, files: Sequence[Path]) -> list[Choice]:
    """The choices of one or more people on the page of a key.

    Raises: InputError for a damaged file, one of another page, or a person who is given twice.
    """
    key = read_json(key_file)
    if not isinstance(key.get("pairs"), list) or not {"page", "lines"} <= {*key}:
        raise InputError(f"{key_file} is no key of a page: expected key.json, written beside it")
    found, raters, digests = [], {}, {}
    for number, path in enumerate(files, 1):
        answers = read_json(path)
        if answers.get("page") != key["page"]:
            raise InputError(
                f"{path} has choices of page {answers.get('page')!a:.40}, {key_file} is the key of "
                f"page {key['page']!a:.40}: give the key that was written with that page"
            )
        rater = str(answers.get("rater") or f"person {number}")
        earlier = digests.setdefault(digest_file(path), path), raters.setdefault(rater, path)
        for other in earlier:
            if other is not path:
                raise InputError(f"{other} and {path} are both of {rater!a:.80}: give one of them")
        found += _choices(path, answers, key, rater)
    if not found:
        raise InputError(f"{', '.join(map(str, files))} hold no choices: judge at least one pair")
    return found


def _choices(path: Path, answers: dict[str, Any], key: dict[str, Any], rater: str) -> list[Choice]:
    listed, made = answers.get("choices"), {}
    if not isinstance(listed, list):
        raise InputError(f"{path} holds no list of choices: expected the file that the page saved")
    for place, one in enumerate(listed):
        pair, side = (
            one.get(name) if isinstance(one, dict) else None for name in ("pair", "choice")
        )
        known = type(pair) is int and 0 <= pair < len(key["pairs"])
        if not known or side not in CHOICES or pair in made:
            raise InputError(
                f"{path} choice {place} is {one!a:.80}: expected each pair of 0 to "
                f"{len(key['pairs']) - 1} at most once, with {', '.join(CHOICES)}"
            )
        hidden = key["pairs"][pair]
        names = {side: hidden[side] for side in ("left", "right")}
        case = hidden["case"]
        made[pair] = Choice(
            rater,
            pair,
            side,
            names.get(side),
            tuple(sorted(names.values(), key=key["lines"].index)),
            key_of([case["benchmark"], case["group"]]),
            case["task"],
        )
    return [*made.values()]


def preferences(choices: Sequence[Choice]) -> list[Preference]:
    """Each two lines that were judged; all tasks together, then each task if there are several."""
    tasks = sorted({choice.task for choice in choices})
    found = []
    for task in ["", *(tasks if len(tasks) > 1 else [])]:
        mine = [choice for choice in choices if task in ("", choice.task)]
        for lines in dict.fromkeys(choice.lines for choice in mine):
            found.append(_preference(task, [choice for choice in mine if choice.lines == lines]))
    return found


def _preference(task: str, choices: Sequence[Choice]) -> Preference:
    first, second = choices[0].lines
    counts = Counter(choice.chosen for choice in choices)
    decided = [choice for choice in choices if choice.chosen is not None]
    return Preference(
        task,
        first,
        second,
        len({choice.picture for choice in choices}),
        counts[first],
        counts[None],
        counts[second],
        _share([choice.chosen == first for choice in decided], [c.picture for c in decided]),
    )


def _share(won: Sequence[bool], pictures: Sequence[str]) -> Estimate:
    """The share of wins, and its interval by what choices have in common."""
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(pictures))}
    if len(numbers) == len(won):
        return share(sum(won), len(won))
    values = np.array([won], dtype=float)
    drawn = estimates(values, np.array([numbers[picture] for picture in pictures]))[0]
    if drawn.low is None or drawn.low == drawn.high:
        return share(drawn.mean * len(numbers), len(numbers))
    return Estimate(drawn.mean, max(drawn.low, 0.0), min(drawn.high, 1.0))


def notes_of(choices: Sequence[Choice]) -> list[str]:
    """How many choices of whom, how often the left side won, and whether people agree."""
    raters = Counter(choice.rater for choice in choices)
    people = ", ".join(f"{rater} {count}" for rater, count in raters.items())
    sides = Counter(choice.side for choice in choices)
    left = share(sides["left"], sides["left"] + sides["right"])
    notes = [f"Choices by person: {people}."]
    if left.low is not None:
        notes.append(
            f"The left side was chosen in {_percent(left)} of those that are not ties. Sides were "
            "drawn at random, so that an interval without 50 % would mean a habit."
        )
    by_pair: dict[int, list[str | None]] = {}
    for choice in choices:
        by_pair.setdefault(choice.pair, []).append(choice.chosen)
    both = [a == b for chosen in by_pair.values() for a, b in combinations(chosen, 2)]
    if both:
        notes.append(
            f"Two people chose alike in {sum(both)} of {len(both)} times that both judged a pair."
        )
    return notes


def csv_of(found: Sequence[Preference]) -> str:
    """The table as CSV, numbers in full."""
    return csv_text(COLUMNS, ({name: _cells(one)[name] for name in COLUMNS} for one in found))


def markdown(found: Sequence[Preference], notes: Sequence[str], question: str) -> str:
    """The table in words: counts, and shares in percent."""
    heads = ("task", "first", "second", "pictures", "wins / ties / losses", "share", "preferred")
    rows = [heads, ["---"] * len(heads)]
    for one in found:
        counts = f"{one.wins} / {one.ties} / {one.losses}"
        told = one.preferred or "not shown"
        name = one.task or "all"
        shared = _percent(one.share)
        rows.append((name, one.first, one.second, str(one.pictures), counts, shared, told))
    table = "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows
    )
    listed = "\n".join(f"- {note}" for note in notes)
    return f"# Preferences\n\n{question}\n\n{table}\n\n{HOW}\n\n{listed}\n"


def _cells(one: Preference) -> dict[str, Any]:
    low, high = one.share.low, one.share.high
    is_there = low is not None
    return {
        **{name: getattr(one, name) for name in COLUMNS if hasattr(one, name)},
        "task": one.task or "all",
        "choices": one.wins + one.ties + one.losses,
        "share": one.share.mean if is_there else None,
        "low": low,
        "high": high,
    }


def _percent(part: Estimate) -> str:
    if part.low is None:
        return ""
    return f"{100 * part.mean:.0f} % ({100 * part.low:.0f} to {100 * part.high:.0f})"
