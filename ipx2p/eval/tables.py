"""A sweep as tables: means over pictures and seeds, in Markdown and CSV (layer 4).

Lines are ordered by task and by network evaluations, so that schemes of equal cost stand beside
each other. `identity` is the source unchanged, which every edit has to beat.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ipx2p.edits import EditSettings
from ipx2p.errors import InputError
from ipx2p.eval.cases import Case
from ipx2p.eval.features import ClipFeatures
from ipx2p.eval.rows import Rows
from ipx2p.eval.scores import METRICS, identity_key, score_key
from ipx2p.eval.sweep import Trial

ALL = "all"  # the task that stands for every picture
SCALES = ("guidance_scale", "image_guidance_scale")
# Column -> heading with unit, and digits behind the point (None: as it is).
COLUMNS: dict[str, tuple[str, int | None]] = {
    "task": ("task", None),
    "guidance": ("guidance", None),
    "guidance_scale": ("guidance scale", None),
    "image_guidance_scale": ("image guidance scale", None),
    "effective": ("effective scales", None),
    "sampler": ("sampler", None),
    "num_steps": ("steps", None),
    "edits": ("edits", None),
    "evaluations": ("network evaluations per edit", None),
    "seconds": ("seconds per edit", 3),
    **{name: (metric.label, metric.digits) for name, metric in METRICS.items()},
}


@dataclass(frozen=True)
class Line:
    """One line of the table: settings (None is identity), and means over its edits."""

    settings: EditSettings | None
    task: str
    edits: int
    evaluations: float = 0.0
    seconds: float = 0.0
    means: dict[str, float] = field(default_factory=dict)

    @property
    def effective(self) -> dict[str, float]:
        """The scales of plain guidance that push about as much, "text" and "image"."""
        return self.settings.make_guidance().effective_scales

    def cells(self) -> dict[str, Any]:
        """The line by column; what it does not have is None."""
        told = {"task": self.task, "edits": self.edits, "guidance": "identity"}
        told |= {"evaluations": self.evaluations, "seconds": self.seconds, **self.means}
        if self.settings is not None:
            for name in ("guidance", *SCALES, "sampler", "num_steps"):
                told[name] = getattr(self.settings, name)
            told["effective"] = f"{self.effective['text']:g}, {self.effective['image']:g}"
        return {name: told.get(name) for name in COLUMNS}


def make_lines(
    trials: Sequence[Trial],
    rows: Rows,
    scores: Rows,
    clip: ClipFeatures | None,
    resolution: int | None,
    metrics: Sequence[str],
) -> list[Line]:
    """The lines of all pictures, then of each task where there are several."""
    tasks = [*dict.fromkeys(trial.case.task for trial in trials)]
    order = [*dict.fromkeys(t.settings.guidance for t in trials)]
    lines = []
    for task in (ALL, *(tasks if len(tasks) > 1 else ())):
        mine = [trial for trial in trials if task in (ALL, trial.case.task)]
        cases = dict.fromkeys(trial.case for trial in mine)
        same = [_scores(identity_key(c, resolution), c, scores, clip) for c in cases]
        lines.append(Line(None, task, len(cases), means=_means(same, metrics)))
        groups: dict[tuple, list[Trial]] = {}
        for trial in mine:
            groups.setdefault(_values(trial.settings), []).append(trial)
        made = [_line(group, task, rows, scores, clip, metrics) for group in groups.values()]
        lines += sorted(
            made, key=lambda line: (line.evaluations, order.index(line.settings.guidance))
        )
    return lines


def _values(settings: EditSettings) -> tuple:
    return tuple(vars(settings).values())


def _line(
    group: Sequence[Trial],
    task: str,
    rows: Rows,
    scores: Rows,
    clip: ClipFeatures | None,
    metrics: Sequence[str],
) -> Line:
    costs = [rows.by_key[trial.key] for trial in group]
    evaluations, seconds = (
        math.fsum(cost[name] for cost in costs) / len(costs) for name in ("evaluations", "seconds")
    )
    measured = [_scores(trial.key, trial.case, scores, clip) for trial in group]
    means = _means(measured, metrics)
    return Line(group[0].settings, task, len(group), evaluations, seconds, means)


def _scores(edit: str, case: Case, scores: Rows, clip: ClipFeatures | None) -> dict[str, float]:
    return scores.by_key[score_key(edit, case, clip)]


def _means(measured: Sequence[dict[str, float]], metrics: Sequence[str]) -> dict[str, float]:
    """Means over the edits that have the metric."""
    there = {name: [one[name] for one in measured if name in one] for name in metrics}
    return {name: sum(values) / len(values) for name, values in there.items() if values}


def columns_of(lines: Sequence[Line]) -> list[str]:
    """Columns that say something: one task, or scales that act as they are, need none."""
    used = [name for name in COLUMNS if any(line.cells()[name] is not None for line in lines)]
    if len({line.task for line in lines}) == 1:
        used.remove("task")
    guided = [line for line in lines if line.settings is not None]
    scales = ((line.settings.guidance_scale, line.settings.image_guidance_scale) for line in guided)
    plain = [(line.effective["text"], line.effective["image"]) for line in guided]
    if [*scales] == plain:
        used.remove("effective")
    return used


def shown_value(name: str, value: Any) -> str:
    """One cell for people."""
    if value is None:
        return ""
    digits = COLUMNS[name][1]
    if digits is None or not isinstance(value, float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return f"{value:.{digits}f}"


def markdown(lines: Sequence[Line]) -> str:
    """One table for each task and number of network evaluations."""
    columns = columns_of(lines)
    columns = [name for name in columns if name not in ("task", "evaluations")]
    parts = []
    for title, group in _groups(lines):
        parts += [f"### {title}", ""]
        parts.append("| " + " | ".join(COLUMNS[name][0] for name in columns) + " |")
        parts.append("|" + "---|" * len(columns))
        for line in group:
            cells = line.cells()
            shown = (shown_value(name, cells[name]).replace("|", "\\|") for name in columns)
            parts.append("| " + " | ".join(shown) + " |")
        parts.append("")
    return "\n".join(parts)


def _groups(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Lines of one task and cost, each group led by the task's identity."""
    several = len({line.task for line in lines}) > 1
    groups: dict[str, list[Line]] = {}
    identity = {line.task: line for line in lines if line.settings is None}
    for line in lines:
        if line.settings is not None:
            prefix = f"{line.task}: " if several else ""
            title = f"{prefix}{line.evaluations:g} network evaluations per edit"
            groups.setdefault(title, [identity[line.task]]).append(line)
    yield from groups.items()


def csv_of_lines(lines: Sequence[Line]) -> str:
    """The table for programs: all digits, the names of the columns as in the code."""
    columns = [*COLUMNS]
    return _csv(columns, ([line.cells()[name] for name in columns] for line in lines))


def csv_of_edits(
    trials: Sequence[Trial], rows: Rows, scores: Rows, clip: ClipFeatures | None
) -> str:
    """One line for each edit: its row and its scores."""
    columns = [*dict.fromkeys(name for trial in trials for name in rows.by_key[trial.key])]
    return _csv(
        ["picture", *columns, *METRICS],
        (
            [
                trial.case.name,
                *(rows.by_key[trial.key].get(name) for name in columns),
                *(_scores(trial.key, trial.case, scores, clip).get(name) for name in METRICS),
            ]
            for trial in trials
        ),
    )


def _csv(columns: Sequence[str], lines: Iterator[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return file.getvalue()


def check_complete(trials: Sequence[Trial], rows: Rows) -> None:
    """Raise InputError when edits are missing that should be there."""
    lost = [trial for trial in trials if trial.key not in rows.by_key]
    if lost:
        raise InputError(
            f"{len(lost)} of {len(trials)} edits are not in {rows.folder}: run it again"
        )
