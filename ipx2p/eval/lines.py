"""Lines of the table: what the edits of one model with one setting have in common (layer 4).

Everything is computed from records, in an order that does not depend on theirs. Means are over
edits; pictures are the samples of intervals, see `intervals`. Differences are over the edits that
both sides have. Seconds are medians: the first edit of a run and other load on the machine do not
count.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np

from ipx2p.errors import InputError, suggestion
from ipx2p.eval.intervals import Difference, Estimate, differences, estimates, paired
from ipx2p.eval.records import BUILT_IN, CLASSICAL_ROW, IDENTITY, ORACLE, Record, names_of
from ipx2p.eval.scores import METRICS

ALL = ""  # the task of lines about all pictures
MUST_BEAT = (IDENTITY, CLASSICAL_ROW)
SCALES = ("guidance_scale", "image_guidance_scale")
EFFECTIVE = tuple(f"effective_{name}" for name in SCALES)
HOW = ("guidance", *SCALES, "sampler", "spacing", "num_steps")
UNITS = ("dB", "%")  # that labels of metrics end with
TRADE_OFF = ("clip_direction", "clip_image")


@dataclass(frozen=True)
class Line:
    """One line of the table: a model with its settings, and means over its edits.

    settings: as in `Record`; None for built-in rows and for pictures made elsewhere. weights:
    their digest, if it is known. task: `ALL` for all together. pictures: photographs, which are the
    samples of the intervals. failed: edits that are not finite, and in no mean. evaluations,
    seconds: of one edit, a mean and a median; infinite if no edit is finite. scores: by metric.
    against: paired differences by label of the reference (the baseline, identity, classical), then
    by metric. trade_off: means over the edits that have both of its metrics. shared: label of the
    earlier line with the same edits. best: metrics by which its scales are the best of its scheme
    at this cost. remarks: what must be said in words. label: short, and unique in its task.
    """

    model: str
    settings: dict[str, Any] | None
    task: str
    pictures: int
    edits: int
    failed: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0
    scores: dict[str, Estimate] = field(default_factory=dict)
    against: dict[str, dict[str, Difference]] = field(default_factory=dict)
    trade_off: dict[str, float] = field(default_factory=dict)
    shared: str | None = None
    best: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    label: str = ""
    weights: str = ""

    @property
    def is_built_in(self) -> bool:
        """Whether it is a row that needs no edit model."""
        return _is_built_in(self.model)

    @property
    def means(self) -> dict[str, float]:
        """The means of its scores."""
        return {name: score.mean for name, score in self.scores.items()}

    @property
    def scales(self) -> dict[str, float | None]:
        """Both scales by name; None for one that the guidance does not use."""
        return {name: (self.settings or {}).get(name) for name in SCALES}

    @property
    def effective(self) -> tuple[float, float] | None:
        """Both scales at which ip2p is exactly the same, or None."""
        both = tuple((self.settings or {}).get(name) for name in EFFECTIVE)
        return None if None in both else both

    @property
    def scheme(self) -> tuple:
        """Equal for lines among which the best scales are chosen."""
        settings = self.settings or {}
        how = settings.get("guidance"), settings.get("sampler"), settings.get("spacing")
        return self.task, self.model, self.weights, *how, self.evaluations

    @property
    def place(self) -> tuple:
        """Its task and row, the same for other pictures."""
        return self.task, *_row(self.model, self.settings, self.weights)


def make_lines(records: Sequence[Record], baseline: str | None = None) -> list[Line]:
    """The lines of all tasks together, then of each task if there are several.

    Within a task: built-in rows, then the others by cost. The best scales are chosen on the records
    that select, if there are any; those are not reported.

    Args:
        baseline: label or model of a line that the others are compared with, besides identity.
    Raises: InputError for an unknown baseline, or scores of one metric that were made differently.
    """
    _check_scored_by(records)
    reported = [record for record in records if not record.selects]
    lines = _lines(reported, baseline)
    choosing = _lines([record for record in records if record.selects])
    return _choose(lines, choosing or lines)


def has_choice(lines: Sequence[Line]) -> bool:
    """Whether there were several scales to choose the best ones from."""
    schemes = [line.scheme for line in lines if line.settings is not None and line.scores]
    return len({*schemes}) < len(schemes)


def _is_built_in(model: str) -> bool:
    return model.partition(" (")[0] in BUILT_IN


def _row(model: str, settings: dict[str, Any] | None, weights: str) -> tuple[str, str, str]:
    """Equal for records of one line."""
    return model, json.dumps(settings, sort_keys=True), weights


def _row_of(record: Record) -> tuple[str, str, str]:
    known = not _is_built_in(record.model)
    weights = record.made_with.get("weights_digest") or "" if known else ""
    return _row(record.model, record.settings, weights)


def _lines(records: Sequence[Record], baseline: str | None = None) -> list[Line]:
    if not records:
        return []
    placed = [Placed(_row_of(record), _place_of(record), record) for record in records]
    first = {one.row: one.record for one in reversed(placed)}
    labels = _labels(first)
    reference = None if baseline is None else _find(baseline, labels)
    tasks = sorted({record.case["task"] for record in records})
    lines = _Task(ALL, placed, labels).lines(reference)
    for task in tasks if len(tasks) > 1 else ():
        mine = [one for one in placed if one.record.case["task"] == task]
        lines += _Task(task, mine, labels).lines(reference)
    return lines


class Placed(NamedTuple):
    """A record with its row of the table, and with its photograph, case and seed."""

    row: tuple
    place: tuple
    record: Record


class _Task:
    """The records of a task, as an array (metrics, edits) for each row of the table."""

    def __init__(self, task: str, placed: Sequence[Placed], labels: dict[tuple, str]) -> None:
        self.task, self.labels = task, labels
        self.rows: dict[tuple, dict[tuple, Record]] = {}
        for row, place, record in placed:
            self.rows.setdefault(row, {})[place] = record
        columns = {place: n for n, place in enumerate(sorted({one.place for one in placed}))}
        self.pictures = _numbered(place[0] for place in columns)
        self.cases = _numbered(place[:2] for place in columns)
        there = {*names_of(one.record for one in placed)}
        self.metrics = [name for name in METRICS if name in there]
        self.values: dict[tuple, np.ndarray] = {}
        for row, mine in self.rows.items():
            values = np.full((len(self.metrics), len(columns)), np.nan)
            for place, record in mine.items():
                if record.picture is not None:
                    scores = [record.scores.get(name, math.nan) for name in self.metrics]
                    values[:, columns[place]] = scores
            self.values[row] = values

    def lines(self, baseline: tuple | None) -> list[Line]:
        """Its lines, in order; baseline: a row, or None."""
        everywhere = {
            place[:2]
            for row, mine in self.rows.items()
            if not _is_built_in(row[0])
            for place in mine
        }
        made = {row: self._line(row) for row in self.rows}
        earlier: dict[frozenset, str] = {}
        lines = []
        for row, line in sorted(made.items(), key=lambda item: _order(item[1])):
            mine = self.rows[row]
            if line.settings is not None:
                edits = frozenset((place, record.edit) for place, record in mine.items())
                first = earlier.setdefault(edits, line.label)
                line = replace(line, shared=None if first == line.label else first)
            against = self._against(row, baseline)
            remarks = [] if line.is_built_in else _remarks(against)
            lacking = len(everywhere - {place[:2] for place in mine})
            if lacking:
                remarks.append(
                    f"lacks {lacking} of {len(everywhere)} cases: its means are over the others, "
                    "differences over those that both have"
                )
            lines.append(replace(line, against=against, remarks=tuple(remarks)))
        return lines

    def _line(self, row: tuple) -> Line:
        mine = self.rows[row]
        first = next(iter(mine.values()))
        finite = [record for record in mine.values() if record.picture is not None]
        scores = estimates(self.values[row], self.pictures)
        both = [r.scores for r in finite if {*TRADE_OFF} <= {*r.scores}]
        return Line(
            first.model,
            first.settings,
            self.task,
            pictures=len({place[0] for place in mine}),
            edits=len(mine),
            failed=len(mine) - len(finite),
            evaluations=fmean(record.evaluations for record in finite) if finite else math.inf,
            seconds=median(record.seconds for record in finite) if finite else math.inf,
            scores={name: one for name, one in zip(self.metrics, scores, strict=True) if one},
            trade_off={name: fmean(one[name] for one in both) for name in TRADE_OFF if both},
            label=self.labels[row],
            weights=row[2],
        )

    def _against(self, row: tuple, baseline: tuple | None) -> dict[str, dict[str, Difference]]:
        if row[0] in (IDENTITY, ORACLE):
            return {}
        metrics = [METRICS[name] for name in self.metrics]
        how = [metric.digits for metric in metrics], [metric.better for metric in metrics]
        references = [baseline, *(_row(name, None, "") for name in MUST_BEAT)]
        against = {}
        for other in dict.fromkeys(references):
            if other in self.rows and other != row:
                pairs = paired(self.values[row], self.values[other], self.cases)
                found = differences(pairs, self.pictures, self.cases, *how)
                named = zip(self.metrics, found, strict=True)
                against[self.labels[other]] = {name: one for name, one in named if one}
        return against


def _place_of(record: Record) -> tuple[str, str, tuple]:
    """Its photograph, its case, wherever the files are, and its seed."""
    about = {name: value for name, value in record.case.items() if name not in ("source", "target")}
    photograph = [record.case.get("benchmark"), record.case["group"]]
    case = json.dumps(about, sort_keys=True)
    return json.dumps(photograph), case, sortable(record.seed)


def _numbered(sorted_items: Iterable[Any]) -> np.ndarray:
    """A number for each of the items, the same for equal ones."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(item, len(numbers)) for item in sorted_items])


def sortable(value: Any) -> tuple[bool, Any]:
    """A value to sort by, None first."""
    return value is not None, 0 if value is None else value


def _order(line: Line) -> tuple:
    """Built-in rows first, then by cost, then by name and settings."""
    kind = line.model.partition(" (")[0]
    place = BUILT_IN.index(kind) if line.is_built_in else len(BUILT_IN)
    settings = line.settings or {}
    how = [sortable(settings.get(name)) for name in HOW]
    return place, line.evaluations, line.model, line.weights, how


def _labels(rows: dict[tuple, Record]) -> dict[tuple, str]:
    """What tells each row apart: its model, and the settings in which the rows differ."""
    edited = {row: record.settings for row, record in rows.items() if record.settings}
    differ = {name for name in HOW if len({settings.get(name) for settings in edited.values()}) > 1}
    one_model = len({row[0] for row in edited}) == 1
    weights: dict[str, set[str]] = {}
    for row in rows:
        weights.setdefault(row[0], set()).add(row[2])
    labels: dict[tuple, str] = {}
    for row in sorted(rows):
        model, _, digest = row
        settings = rows[row].settings or {}
        told = _told(settings, differ)
        several = [f"weights {digest[:6]}"] if len(weights[model]) > 1 else []
        parts = [model, *several, *told]
        if one_model and told and settings:
            parts = [*several, *told]
        label, count = ", ".join(parts), 1
        while label in labels.values():
            count += 1
            label = f"{', '.join(parts)} ({count})"
        labels[row] = label
    return labels


def _told(settings: dict[str, Any], differ: set[str]) -> list[str]:
    """Those settings that differ, in short."""
    short = {
        "guidance": "{}",
        "sampler": "{}",
        "spacing": "{}",
        "num_steps": "{} steps",
        "guidance_scale": "guidance {:g}",
        "image_guidance_scale": "image {:g}",
    }
    if {"guidance", *SCALES} <= differ:  # as in `apg, 7, 1.5`
        short |= dict.fromkeys(SCALES, "{:g}")
    return [
        short[name].format(settings[name])
        for name in HOW
        if name in differ and settings.get(name) is not None
    ]


def _find(baseline: str, labels: dict[tuple, str]) -> tuple:
    """The row of that label, or the only one of that model."""
    for rows in (
        [row for row, label in labels.items() if label == baseline],
        [row for row in labels if row[0] == baseline],
    ):
        if len(rows) == 1:
            return rows[0]
    known = suggestion(baseline, [*labels.values()])
    raise InputError(f"the baseline {baseline!r} is not one line of the table; {known}")


def _check_scored_by(records: Iterable[Record]) -> None:
    """Raise InputError for a metric that was measured in different ways."""
    first: dict[str, tuple[str, Record]] = {}
    for record in records:
        for name in record.scores:
            how = record.scored_by.get(name, "")
            known, other = first.setdefault(name, (how, record))
            if how != known:
                raise InputError(
                    f"{name} was measured by {known or 'nothing named'!r} in {other.folder} and by "
                    f"{how or 'nothing named'!r} in {record.folder}: such numbers have no common "
                    "mean; measure one of them again, or report the folders apart"
                )


def _remarks(against: dict[str, dict[str, Difference]]) -> list[str]:
    """What it does not beat, by the metrics that choose."""
    said: dict[str, list[str]] = {}
    for reference in MUST_BEAT:
        for name, one in against.get(reference, {}).items():
            metric = METRICS[name]
            if not metric.chooses or not (verdict := _verdict(one, metric.better)):
                continue
            label, _, unit = metric.label.rpartition(", ")
            if unit not in UNITS:
                label, unit = metric.label, ""
            mean, low, high = (
                "" if value is None else f"{value:+.{metric.digits}f}"
                for value in (one.mean, one.low, one.high)
            )
            mean, spread = f"{mean} {unit}".strip(), f"{low} to {high}" if low else "no interval"
            said.setdefault(f"{verdict} {reference} by", []).append(f"{label} ({mean}, {spread})")
    return [f"{start} {', '.join(shown)}" for start, shown in said.items()]


def _verdict(one: Difference, better: int) -> str:
    """In words; empty if it is better."""
    if one.low is None:
        return "does not beat" if better * one.mean <= 0 else "not shown to beat"
    low, high = sorted((better * one.low, better * one.high))
    return "" if low > 0 else "does not beat" if high <= 0 else "not shown to beat"


def _choose(lines: Sequence[Line], choosing: Sequence[Line]) -> list[Line]:
    """The same lines, the best scales of each scheme at its cost marked.

    Args:
        choosing: lines of the same rows, for the pictures that decide.
    """
    deciding = {line.place: line.means for line in choosing}
    groups: dict[tuple, list[int]] = {}
    for index, line in enumerate(lines):
        if line.settings is not None:
            groups.setdefault(line.scheme, []).append(index)
    best: dict[int, list[str]] = {}
    for group in groups.values():
        for name, metric in METRICS.items():
            measured = [index for index in group if name in lines[index].scores]
            if measured and metric.chooses:
                values = {
                    index: metric.better * deciding[lines[index].place][name]
                    for index in measured
                    if name in deciding.get(lines[index].place, {})
                }
                top = max(measured, key=lambda index: values.get(index, -math.inf))
                best.setdefault(top, []).append(name)
    return [replace(line, best=tuple(best.get(i, ()))) for i, line in enumerate(lines)]
