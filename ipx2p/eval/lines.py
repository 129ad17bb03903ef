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
from typing import Any

import numpy as np

from ipx2p.errors import InputError
from ipx2p.eval.intervals import Difference, Estimate, differences, estimates, paired
from ipx2p.eval.models import SCALES, stacks_of
from ipx2p.eval.records import (
    BUILT_IN,
    CLASSICAL_ROW,
    IDENTITY,
    MADE,
    ORACLE,
    Record,
    names_of,
)
from ipx2p.eval.scores import METRICS

ALL = ""  # the task of lines about all pictures
MUST_BEAT = (IDENTITY, CLASSICAL_ROW)
EFFECTIVE = tuple(f"effective_{name}" for name in SCALES)
# What labels tell of the settings in which lines differ.
TOLD = {
    "guidance": "{}",
    "guidance_scale": "guidance {:g}",
    "image_guidance_scale": "image {:g}",
    "fidelity": "{}",
    "window": "window {}",
    "sampler": "{}",
    "spacing": "{}",
    "num_steps": "{} steps",
}
TOLD_OF_MADE = ("weights {:.6}", "resolution {}", "{}", "without {!r}", "weak {:.6}")
UNITS = ("dB", "%")  # that labels of metrics end with
Row = tuple[str, str, tuple[str, ...]]  # of a record and its line


@dataclass(frozen=True)
class Line:
    """One line of the table: a model with its settings, and means over its edits.

    settings: as in `Record`; None for built-in rows and for pictures made elsewhere. task: `ALL`
    for all together. pictures: photographs, which are the samples of the intervals. failed: edits
    that are not finite, and in no mean. evaluations, seconds: of one edit, a mean and a median;
    infinite if no edit is finite. scores: by metric. against: paired differences by label of the
    reference (the baseline, identity, classical), then by metric. shared: label of the earlier line
    with the same edits. best: metrics by which its scales are the best of its scheme.
    remarks: what must be said in words. label: short, and unique in its task. made: digest of the
    weights, resolution and dtype, each "" if it is not known.
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
    shared: str | None = None
    best: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    label: str = ""
    made: tuple[str, ...] = ("",) * len(MADE)

    @property
    def is_built_in(self) -> bool:
        """Whether it is a row that needs no edit model."""
        return self.model in BUILT_IN

    @property
    def means(self) -> dict[str, float]:
        """The means of its scores."""
        return {name: score.mean for name, score in self.scores.items()}

    @property
    def scales(self) -> tuple[float | None, ...]:
        """Both scales; None for one that the guidance does not use."""
        return tuple((self.settings or {}).get(name) for name in SCALES)

    @property
    def effective(self) -> tuple[float, float] | None:
        """Both scales at which ip2p is exactly the same, or None."""
        both = tuple((self.settings or {}).get(name) for name in EFFECTIVE)
        return None if None in both else both

    @property
    def scheme(self) -> tuple:
        """Equal for lines that differ in scales and steps alone."""
        settings = self.settings or {}
        how = (settings.get(name) for name in ("sampler", "spacing"))
        return self.model, self.made, stacks_of(settings), *how

    @property
    def row(self) -> Row:
        """That of its records."""
        return self.model, json.dumps(self.settings, sort_keys=True), self.made


def make_lines(records: Sequence[Record], baseline: str | None = None) -> list[Line]:
    """The lines of all tasks together, then of each task if there are several.

    Within a task: built-in rows, then the others by cost. The best scales are chosen on the records
    that select, if there are any; those are not reported.

    Args:
        baseline: label or model of a line that the others are compared with, besides identity.
    Raises: InputError for an unknown baseline, or scores of one metric that were made differently.
    """
    _check_scored_by(records)
    benchmarks = sorted({str(record.case.get("benchmark") or "own pairs") for record in records})
    if len(benchmarks) > 1:
        raise InputError(
            f"{' and '.join(benchmarks)} have no common mean: report their folders apart"
        )
    reported = [record for record in records if not record.selects]
    lines = _lines(reported, baseline)
    choosing = _lines([record for record in records if record.selects])
    return _choose(lines, choosing or lines)


def _lines(records: Sequence[Record], baseline: str | None = None) -> list[Line]:
    if not records:
        return []
    labels = _labels({record.row: record for record in records})
    reference = None if baseline is None else _find(baseline, labels)
    tasks = sorted({record.case["task"] for record in records})
    lines = _Task(ALL, records, labels).lines(reference)
    for task in tasks if len(tasks) > 1 else ():
        mine = [record for record in records if record.case["task"] == task]
        lines += _Task(task, mine, labels).lines(reference)
    return lines


class _Task:
    """The records of a task, as an array (metrics, edits) for each row of the table."""

    def __init__(self, task: str, records: Sequence[Record], labels: dict[Row, str]) -> None:
        self.task, self.labels = task, labels
        self.rows: dict[Row, dict[tuple, Record]] = {}
        for record in records:
            self.rows.setdefault(record.row, {})[_place_of(record)] = record
        columns = sorted({place for mine in self.rows.values() for place in mine})
        self.pictures = _numbered(place[0] for place in columns)
        self.cases = _numbered(place[:2] for place in columns)
        there = {*names_of(records)}
        self.metrics = [name for name in METRICS if name in there]
        self.values: dict[Row, np.ndarray] = {}
        for row, mine in self.rows.items():
            values = np.full((len(self.metrics), len(columns)), np.nan)
            for number, place in enumerate(columns):
                record = mine.get(place)
                if record is not None and record.picture is not None:
                    scores = [record.scores.get(name, math.nan) for name in self.metrics]
                    values[:, number] = scores
            self.values[row] = values

    def lines(self, baseline: Row | None) -> list[Line]:
        """Its lines, in order."""
        edited = [mine for row, mine in self.rows.items() if row[0] not in BUILT_IN]
        everywhere = {place[:2] for mine in edited for place in mine}
        earlier: dict[frozenset, str] = {}
        lines = []
        for line in sorted(map(self._line, self.rows), key=_order):
            mine, shared = self.rows[line.row], None
            if line.settings is not None:
                edits = frozenset((place, record.edit) for place, record in mine.items())
                first = earlier.setdefault(edits, line.label)
                shared = None if first == line.label else first
            against = self._against(line.row, baseline)
            remarks = [] if line.is_built_in else _remarks(against)
            if lacking := len(everywhere - {place[:2] for place in mine}):
                remarks.append(
                    f"lacks {lacking} of {len(everywhere)} cases: its means are over the others, "
                    "differences over those that both have"
                )
            lines.append(replace(line, shared=shared, against=against, remarks=tuple(remarks)))
        return lines

    def _line(self, row: Row) -> Line:
        mine = [*self.rows[row].values()]
        finite = [record for record in mine if record.picture is not None]
        scores = estimates(self.values[row], self.pictures)
        return Line(
            mine[0].model,
            mine[0].settings,
            self.task,
            pictures=len({place[0] for place in self.rows[row]}),
            edits=len(mine),
            failed=len(mine) - len(finite),
            evaluations=fmean(record.evaluations for record in finite) if finite else math.inf,
            seconds=median(record.seconds for record in finite) if finite else math.inf,
            scores={
                name: one.within(*METRICS[name].bounds)
                for name, one in zip(self.metrics, scores, strict=True)
                if one
            },
            label=self.labels[row],
            made=row[2],
        )

    def _against(self, row: Row, baseline: Row | None) -> dict[str, dict[str, Difference]]:
        if row[0] in (IDENTITY, ORACLE):
            return {}
        metrics = [METRICS[name] for name in self.metrics]
        how = [metric.digits for metric in metrics], [metric.better for metric in metrics]
        against = {}
        for other in [
            baseline,
            *(one for name in MUST_BEAT for one in self.rows if one[0] == name),
        ]:
            if other in self.rows and other != row:
                pairs = paired(self.values[row], self.values[other], self.cases)
                found = differences(pairs, self.pictures, self.cases, *how)
                named = zip(self.metrics, found, strict=True)
                against[self.labels[other]] = {name: one for name, one in named if one}
        return against


def _place_of(record: Record) -> tuple[str, str, tuple]:
    """Its photograph, its case, wherever the files are, and its seed."""
    photograph = [record.case.get("benchmark"), record.case["group"]]
    case = json.dumps(record.about, sort_keys=True)
    return json.dumps(photograph), case, sortable(record.seed)


def _numbered(items: Iterable[Any]) -> np.ndarray:
    """A number for each of the items, the same for equal ones."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(item, len(numbers)) for item in items])


def sortable(value: Any) -> tuple[bool, Any]:
    """A value to sort by, None first."""
    return value is not None, 0 if value is None else value


def _order(line: Line) -> tuple:
    """Built-in rows first, then by cost, then by name and settings."""
    place = BUILT_IN.index(line.model) if line.is_built_in else len(BUILT_IN)
    how = [sortable((line.settings or {}).get(name)) for name in TOLD]
    return place, line.evaluations, line.model, line.made, how


def _labels(rows: dict[Row, Record]) -> dict[Row, str]:
    """What tells each row apart: its model, and the settings in which the rows differ."""
    edited = [record for record in rows.values() if record.settings]
    differ = {name for name in TOLD if len({one.settings.get(name) for one in edited}) > 1}
    # as in `apg, 7, 1.5`
    brief = dict.fromkeys(SCALES, "{:g}") if {"guidance", *SCALES} <= differ else {}
    one_model = len({record.model for record in edited}) == 1
    labels: dict[Row, str] = {}
    for row in sorted(rows):
        model, _, made = row
        alike = zip(*(other[2] for other in rows if other[0] == model), strict=True)
        parts = [
            told.format(mine)
            for told, mine, found in zip(TOLD_OF_MADE, made, alike, strict=True)
            if len({*found}) > 1
        ]
        settings = rows[row].settings or {}
        told = [
            (TOLD | brief)[name].format(settings[name])
            for name in TOLD
            if name in differ and settings.get(name) is not None
        ]
        parts = [*parts, *told] if one_model and told else [model, *parts, *told]
        label, count = ", ".join(parts), 1
        while label in labels.values():
            count += 1
            label = f"{', '.join(parts)} ({count})"
        labels[row] = label
    return labels


def _find(baseline: str, labels: dict[Row, str]) -> Row:
    """The row of that label, or the only one of that model."""
    for rows in (
        [row for row, label in labels.items() if label == baseline],
        [row for row in labels if row[0] == baseline],
    ):
        if len(rows) == 1:
            return rows[0]
    known = "; ".join(dict.fromkeys([*labels.values(), *(row[0] for row in labels)]))
    raise InputError(f"the baseline {baseline!r} is not one row of the table, expected: {known}")


def _check_scored_by(records: Iterable[Record]) -> None:
    """Raise InputError for a metric that was measured in different ways."""
    first: dict[str, tuple[str, Record]] = {}
    for record in records:
        for name in record.scores:
            how = record.scored_by.get(name, "")
            how = how.partition(" (")[2] or how  # a network may be called by its path
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
                "" if value is None else rounded(value, metric.digits, "+")
                for value in (one.mean, one.low, one.high)
            )
            mean, spread = f"{mean} {unit}".strip(), f"{low} to {high}" if low else "no interval"
            said.setdefault(f"{verdict} {reference} by", []).append(f"{label} ({mean}, {spread})")
    return [f"{start} {', '.join(shown)}" for start, shown in said.items()]


def rounded(value: float, digits: int, sign: str = "") -> str:
    """A number in print; zero has no minus."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def _verdict(one: Difference, better: int) -> str:
    """In words; empty if it is better."""
    if one.low is None:
        return "does not beat" if better * one.mean <= 0 else "not shown to beat"
    low, high = sorted((better * one.low, better * one.high))
    return "" if low > 0 else "does not beat" if high <= 0 else "not shown to beat"


def _choices(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines of each scheme, in each task and number of steps: one has its best scales."""
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        if line.settings is not None and line.scores:
            steps = line.settings["num_steps"]
            groups.setdefault((line.task, steps, line.scheme), []).append(line)
    return [*groups.values()]


def check_baseline(records: Sequence[Record], baseline: str | None) -> None:
    """Raise InputError for a baseline that is no line of these records, which need no pictures."""
    if baseline is not None:
        _find(baseline, _labels({record.row: record for record in records}))


def has_choice(lines: Sequence[Line]) -> bool:
    """Whether there were several scales to choose the best ones from."""
    return any(len(group) > 1 for group in _choices(lines))


def _choose(lines: Sequence[Line], choosing: Sequence[Line]) -> list[Line]:
    """The same lines, the best scales of each scheme marked.

    Args:
        choosing: lines of the same rows, for the pictures that decide.
    """
    deciding = {(line.task, line.row): line.means for line in choosing}
    best: dict[tuple, list[str]] = {}
    for group in _choices(lines):
        for name, metric in METRICS.items():
            measured = [(line.task, line.row) for line in group if name in line.scores]
            if measured and metric.chooses:
                known = [deciding.get(place, {}).get(name) for place in measured]
                if all(one is None for one in known):
                    continue
                worths = [-math.inf if one is None else metric.better * one for one in known]
                best.setdefault(measured[worths.index(max(worths))], []).append(name)
    return [replace(line, best=tuple(best.get((line.task, line.row), ()))) for line in lines]
