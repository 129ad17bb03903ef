"""Pairs of edits, and the page on which people judge them without seeing whose they are (layer 4).

The page is one file: pictures as PNG without metadata, in the order in which they are shown, each
once; which side an edit is on is drawn for each pair. What the sides hide is in the key, a file of
its own.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ipx2p.errors import InputError, suggestion
from ipx2p.eval.lines import ALL, make_lines
from ipx2p.eval.records import IDENTITY, ORACLE, Record, is_built_in, key_of
from ipx2p.files import atomic_write, digest_bytes, read_json, write_json
from ipx2p.images import load_image
from ipx2p.seeds import generator

PAGE, KEY = "page.html", "key.json"
TEMPLATE = Path(__file__).parent / "side_by_side.html"


@dataclass(frozen=True)
class Pair:
    """Two edits of a case with the same noise. first, second: by label, in the order of tables."""

    first: str
    second: str
    edits: tuple[Record, Record]
    source: Record | None
    target: Record | None


def find_pairs(records: Sequence[Record], labels: Sequence[str] = ()) -> list[Pair]:
    """All pairs of different lines of the table, for each case and seed.

    A line without seeds, as pictures made elsewhere, is paired with every seed of the other.

    Args:
        labels: of the lines to judge, or models; none is all but the built-in rows.
    Raises: InputError for an unknown label, or fewer than two.
    """
    named = _labelled([record for record in records if not record.selects])
    chosen = _chosen(named, labels)
    cases: dict[str, dict[str, dict[int | None, Record]]] = {}
    for label, mine in named.items():
        for record in mine:
            about = {k: v for k, v in record.case.items() if k not in ("source", "target")}
            case = cases.setdefault(key_of(about), {})
            case.setdefault(label, {})[record.seed] = record
    pairs = []
    for case in cases.values():
        source, target = (
            next(iter(case.get(name, {}).values()), None) for name in (IDENTITY, ORACLE)
        )
        for first, second in combinations([label for label in chosen if label in case], 2):
            for edits in _same_seed(case[first], case[second]):
                pairs.append(Pair(first, second, edits, source, target))
    if not pairs:
        raise InputError(
            f"no case has edits of two of {', '.join(chosen)}: evaluate them on the same cases"
        )
    return pairs


def _labelled(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each line of the table, by its label."""
    bare = [replace(record, scores={}, scored_by={}) for record in records]
    lines = [line for line in make_lines(bare) if line.task == ALL]
    labels = {line.row: line.label for line in lines}
    named: dict[str, list[Record]] = {line.label: [] for line in lines}
    for record in records:
        named[labels[record.row]].append(record)
    return named


def _chosen(named: Mapping[str, Sequence[Record]], labels: Sequence[str]) -> list[str]:
    models = {label: mine[0].model for label, mine in named.items()}
    for label in labels:
        if label not in models and label not in models.values():
            raise InputError(f"no edits of {label!r}; {suggestion(label, [*models])}")
    if labels:
        chosen = [label for label in models if {label, models[label]} & {*labels}]
    else:
        chosen = [label for label in models if not is_built_in(models[label])]
    if len(chosen) < 2:
        raise InputError(
            f"{len(chosen)} to judge ({', '.join(chosen) or 'none'}), expected two or more of "
            f"{', '.join(models)}: add a folder, or name some with --models"
        )
    return chosen


def _same_seed(
    one: Mapping[int | None, Record], other: Mapping[int | None, Record]
) -> list[tuple[Record, Record]]:
    seeds = [seed for seed in {**one, **other} if seed is not None] or [None]
    both = [(one.get(seed, one.get(None)), other.get(seed, other.get(None))) for seed in seeds]
    return [(a, b) for a, b in both if a is not None and b is not None]


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
    album, shown, hidden = Album(), [], []
    for place in order:
        pair, flip = pairs[place], sides[place]
        if any(edit.picture is None for edit in pair.edits):
            counts["failed"] += 1
            continue
        if limit is not None and len(shown) == limit:
            counts["more"] += 1
            continue
        if len({digest_bytes(album.png(edit)) for edit in pair.edits}) == 1:
            counts["identical"] += 1
            continue
        left, right = pair.edits[::-1] if flip else pair.edits
        pictures = {"source": pair.source, "left": left, "right": right, "target": pair.target}
        instruction = left.case["instruction"]
        shown.append({"instruction": instruction} | {k: album.add(v) for k, v in pictures.items()})
        about = {name: left.case.get(name) for name in ("name", "group", "task", "benchmark")}
        names = (pair.second, pair.first) if flip else (pair.first, pair.second)
        hidden.append({"case": about, "seed": left.seed, "left": names[0], "right": names[1]})
        counts["pairs"] += 1
    if not shown:
        raise InputError(
            f"nothing to judge: of {len(pairs)} pairs {counts['identical']} are identical and "
            f"{counts['failed']} have an edit that is not finite"
        )
    page = key_of([seed, question, [digest_bytes(png) for png in album.pngs], shown])
    _check_free(output / KEY, page)
    lines = [*dict.fromkeys(label for pair in pairs for label in (pair.first, pair.second))]
    key = {"page": page, "question": question, "seed": seed, "lines": lines, "pairs": hidden}
    write_json(key, output / KEY)
    _write(page, shown, album.pngs, question, output / PAGE)
    return counts


class Album:
    """Pictures of a page as PNG, in the order in which they are shown, each once."""

    def __init__(self) -> None:
        self.pngs: list[bytes] = []
        self.encoded: dict[Path, bytes] = {}
        self.numbers: dict[bytes, int] = {}

    def png(self, record: Record) -> bytes:
        """Its picture without metadata, which would tell where it is from."""
        path = record.path
        if path not in self.encoded:
            file = io.BytesIO()
            load_image(path).save(file, "PNG")
            self.encoded[path] = file.getvalue()
        return self.encoded[path]

    def add(self, record: Record | None) -> int | None:
        """The number of its picture; None without one."""
        if record is None or record.picture is None:
            return None
        png = self.png(record)
        if png not in self.numbers:
            self.numbers[png] = len(self.pngs)
            self.pngs.append(png)
        return self.numbers[png]


def _check_free(path: Path, page: str) -> None:
    if path.exists() and read_json(path).get("page") != page:
        raise InputError(f"{path} is the key of another page: choose another --output")


def _write(
    page: str, shown: list[dict[str, Any]], pngs: Sequence[bytes], question: str, path: Path
) -> None:
    data = {"page": page, "question": question, "pairs": shown}
    data["pictures"] = [base64.b64encode(png).decode() for png in pngs]
    text = json.dumps(data).replace("<", "\\u003c")  # "</script>" would end the data
    html = TEMPLATE.read_text(encoding="utf-8").replace("{data}", text, 1)
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
