"""Judging by eye: a page that hides whose edits it shows, and what people chose on it (layer 4).

The page is one file: pictures as PNG without metadata, in the order in which they are shown, each
once; which side an edit is on is drawn for each pair. What the sides hide is in the key, a file of
its own.
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ipx2p.errors import InputError, suggestion
from ipx2p.eval.intervals import Estimate, estimates, share
from ipx2p.eval.lines import ALL, make_lines
from ipx2p.eval.records import BUILT_IN, IDENTITY, ORACLE, Record, key_of
from ipx2p.eval.tables import Cell, Table, markdown
from ipx2p.files import atomic_write, csv_text, digest_bytes, digest_file, read_json, write_json
from ipx2p.images import load_image
from ipx2p.seeds import generator

PAGE, KEY = "page.html", "key.json"
TEMPLATE = Path(__file__).parent / "side_by_side.html"
CHOICES = ("left", "tie", "right")
HOW = (
    "Wins are choices of the first. The share of wins is among choices that are not ties, with its "
    "95 % interval: over pictures where several choices are about one picture, else Wilson's. A "
    "row is preferred where the interval is on one side of 50 %."
)


class Pair(NamedTuple):
    """Two edits of a case with the same noise, and their labels in the order of tables."""

    labels: tuple[str, str]
    edits: tuple[Record, Record]
    source: Record | None
    target: Record | None


class Choice(NamedTuple):
    """One judgement of a pair.

    chosen: the label that was preferred, None for a tie. labels: both, as in the table. picture:
    equal for choices about one photograph.
    """

    rater: str
    chosen: str | None
    labels: tuple[str, str]
    picture: str
    task: str


class Preference(NamedTuple):
    """How two lines compare: counts of choices, and the share of the first without ties."""

    task: str
    first: str
    second: str
    pictures: int
    choices: int
    wins: int
    ties: int
    losses: int
    share: float | None
    low: float | None
    high: float | None
    preferred: str


def find_pairs(records: Sequence[Record], labels: Sequence[str] = ()) -> list[Pair]:
    """All pairs of different lines of the table, for each case and seed.

    A line without seeds, as pictures made elsewhere, is paired with every seed of the other.

    Args:
        labels: of the lines to judge, or models; none is all but the built-in rows.
    Raises: InputError for an unknown label, or fewer than two.
    """
    records = [record for record in records if not record.selects]
    lines = make_lines([replace(record, scores={}, scored_by={}) for record in records])
    lines = [line for line in lines if line.task == ALL]
    chosen = _chosen({line.label: line.model for line in lines}, labels)
    cases: dict[str, dict[str, dict[int | None, Record]]] = {}
    made: dict[tuple, list[Record]] = {}
    for record in records:
        made.setdefault(record.row, []).append(record)
    for line in lines:
        for record in made[line.row]:
            case = cases.setdefault(key_of(record.about), {})
            case.setdefault(line.label, {})[record.seed] = record
    pairs = []
    for case in cases.values():
        shown = [next(iter(case.get(name, {}).values()), None) for name in (IDENTITY, ORACLE)]
        for both in combinations([label for label in chosen if label in case], 2):
            edits = _same_seed(*(case[label] for label in both))
            pairs += [Pair(both, two, *shown) for two in edits]
    if not pairs:
        raise InputError(
            f"no case has edits of two of {', '.join(chosen)}: evaluate them on the same cases"
        )
    return pairs


def _chosen(models: Mapping[str, str], labels: Sequence[str]) -> list[str]:
    """The labels to judge, of all with their models."""
    for label in labels:
        if label not in models and label not in models.values():
            raise InputError(f"no edits of {label!r}; {suggestion(label, [*models])}")
    if labels:
        chosen = [label for label in models if {label, models[label]} & {*labels}]
    else:
        chosen = [label for label in models if models[label] not in BUILT_IN]
    if len(chosen) < 2:
        raise InputError(
            f"{len(chosen)} to judge ({', '.join(chosen) or 'none'}), expected two or more of "
            f"{', '.join(models)}: add a folder, or name some with --models"
        )
    return chosen


def _same_seed(
    one: Mapping[int | None, Record], other: Mapping[int | None, Record]
) -> Iterator[tuple[Record, Record]]:
    for seed in [seed for seed in {**one, **other} if seed is not None] or [None]:
        a, b = (edits.get(seed, edits.get(None)) for edits in (one, other))
        if a is not None and b is not None:
            yield a, b


def write_page(
    pairs: Sequence[Pair], output: Path, *, question: str, seed: int, limit: int | None = None
) -> dict[str, int]:
    """Write the page and its key.

    Pairs whose pictures are the same, or of which one is not finite, are left out: there is nothing
    to judge.

    Args:
        seed: of the order, of the sides, and of which pairs are taken. limit: at most so many.
    Returns: counts by what was done: "pairs", "identical", "failed", "more" beyond the limit.
    Raises: InputError for a picture that is gone, no pair to judge, or a folder with the key of
        another page, whose choices nothing else can read.
    """
    order = torch.randperm(len(pairs), generator=generator(seed, "order of pairs")).tolist()
    sides = torch.randint(2, (len(pairs),), generator=generator(seed, "sides of pairs")).tolist()
    counts = dict.fromkeys(("pairs", "identical", "failed", "more"), 0)
    png, numbers = cache(_png), {}
    shown, hidden = [], []
    for pair, flip in ((pairs[place], sides[place]) for place in order):
        done = "pairs"
        if any(edit.picture is None for edit in pair.edits):
            done = "failed"
        elif limit is not None and len(shown) == limit:
            done = "more"
        elif len({png(edit.path) for edit in pair.edits}) == 1:
            done = "identical"
        counts[done] += 1
        if done != "pairs":
            continue
        (left, right), names = (x[::-1] if flip else x for x in (pair.edits, pair.labels))
        pictures = {"source": pair.source, "left": left, "right": right, "target": pair.target}
        shown.append({"instruction": left.case["instruction"]})
        for side, record in pictures.items():
            is_there = record is not None and record.picture is not None
            number = numbers.setdefault(png(record.path), len(numbers)) if is_there else None
            shown[-1][side] = number
        about = {name: left.case.get(name) for name in ("name", "group", "task", "benchmark")}
        hidden.append({"case": about, "seed": left.seed, "left": names[0], "right": names[1]})
    if not shown:
        raise InputError(
            f"nothing to judge: of {len(pairs)} pairs {counts['identical']} are identical and "
            f"{counts['failed']} have an edit that is not finite"
        )
    about = {
        "page": key_of([seed, question, [*map(digest_bytes, numbers)], shown]),
        "question": question,
    }
    path = output / KEY
    if path.exists() and read_json(path).get("page") != about["page"]:
        raise InputError(f"{path} is the key of another page: choose another --output")
    lines = [*dict.fromkeys(label for pair in pairs for label in pair.labels)]
    write_json(about | {"seed": seed, "lines": lines, "pairs": hidden}, path)
    pictures = [base64.b64encode(data).decode() for data in numbers]
    text = json.dumps(about | {"pairs": shown, "pictures": pictures})
    text = text.replace("<", "\\u003c")  # "</script>" would end the data
    html = TEMPLATE.read_text(encoding="utf-8").replace("{data}", text, 1)
    with atomic_write(output / PAGE) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return counts


def _png(path: Path) -> bytes:
    """A picture without metadata, which would tell where it is from."""
    file = io.BytesIO()
    load_image(path).save(file, "PNG")
    return file.getvalue()


def read_choices(key_file: Path, files: Sequence[Path]) -> list[Choice]:
    """The choices of one or more people on the page of a key.

    Raises: InputError for a damaged file, one of another page, or a person who is given twice.
    """
    key = read_json(key_file)
    if not isinstance(key.get("pairs"), list) or not {"page", "lines"} <= {*key}:
        raise InputError(
            f"{key_file} is not the key of a page: expected key.json, written beside it"
        )
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
        match one:
            case {"pair": int(pair), "choice": side} if (
                0 <= pair < len(key["pairs"]) and side in CHOICES and pair not in made
            ):
                hidden = key["pairs"][pair]
            case _:
                raise InputError(
                    f"{path} choice {place} is {one!a:.80}: expected each pair of 0 to "
                    f"{len(key['pairs']) - 1} at most once, with {', '.join(CHOICES)}"
                )
        labels = sorted((hidden["left"], hidden["right"]), key=key["lines"].index)
        case = hidden["case"]
        picture = key_of([case["benchmark"], case["group"]])
        chosen = None if side == "tie" else hidden[side]
        made[pair] = Choice(rater, chosen, tuple(labels), picture, case["task"])
    return [*made.values()]


def preferences(choices: Sequence[Choice]) -> list[Preference]:
    """Each two lines that were judged; all tasks together, then each task if there are several."""
    tasks = sorted({choice.task for choice in choices})
    groups: dict[tuple[str, tuple[str, str]], list[Choice]] = {}
    for task in [ALL, *(tasks if len(tasks) > 1 else [])]:
        for choice in choices:
            if task in (ALL, choice.task):
                groups.setdefault((task or "all", choice.labels), []).append(choice)
    return [_preference(*place, mine) for place, mine in groups.items()]


def _preference(task: str, labels: tuple[str, str], choices: Sequence[Choice]) -> Preference:
    first, second = labels
    counts = Counter(choice.chosen for choice in choices)
    decided = [choice for choice in choices if choice.chosen is not None]
    part = _share([choice.chosen == first for choice in decided], [c.picture for c in decided])
    preferred = ""
    if part.low is not None and not part.low <= 0.5 <= part.high:
        preferred = first if part.mean > 0.5 else second
    pictures = len({choice.picture for choice in choices})
    tally = (len(choices), counts[first], counts[None], counts[second])
    mean = None if part.low is None else part.mean
    return Preference(task, *labels, pictures, *tally, mean, part.low, part.high, preferred)


def _share(won: Sequence[bool], pictures: Sequence[str]) -> Estimate:
    """The share of wins among choices.

    If each picture was judged once, choices are independent and the interval is Wilson's (1927).
    Choices of several people, seeds or tasks on one picture are not: pictures are drawn, see
    `intervals`. Where that gives no interval (few pictures, or nearly all alike), it is Wilson's
    with as many choices as there are pictures, which is wide rather than wrong.
    """
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(pictures))}
    if len(numbers) == len(won):
        return share(sum(won), len(won))
    where = np.array([numbers[picture] for picture in pictures])
    [drawn] = estimates(np.array([won], dtype=float), where)
    if drawn.low is None or drawn.low == drawn.high:
        return share(drawn.mean * len(numbers), len(numbers))
    return drawn.within(0.0, 1.0)


def preference_table(choices: Sequence[Choice], question: str) -> tuple[str, str]:
    """The preferences as Markdown, and as CSV with numbers in full."""
    found = preferences(choices)
    heads = ("task", "first", "second", "pictures", "wins / ties / losses", "share", "preferred")
    rows = []
    for one in found:
        tally, percent = f"{one.wins} / {one.ties} / {one.losses}", ""
        if one.share is not None:
            percent = f"{100 * one.share:.0f} % ({100 * one.low:.0f} to {100 * one.high:.0f})"
        texts = (*one[:3], str(one.pictures), tally, percent, one.preferred or "not shown")
        rows.append([*map(Cell, texts)])
    raters = Counter(choice.rater for choice in choices)
    people = ", ".join(f"{rater} {count}" for rater, count in raters.items())
    about = [question, HOW, f"Choices by person: {people}."]
    text = markdown(Table("Preferences", about, heads, rows)) + "\n"
    return text, csv_text(Preference._fields, (one._asdict() for one in found))
