"""A sweep as tables: means over pictures and seeds, in Markdown and CSV (layer 4).

Seconds are medians: the first edit of a run and other load on the machine do not count. Lines are
ordered by task and network evaluations, so that schemes of equal cost are listed together.
`identity` is the unchanged source, which every edit must beat.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from statistics import fmean, median
from typing import Any

from ipx2p.editing.settings import EditSettings
from ipx2p.eval.scores import METRICS, Results
from ipx2p.eval.sweep import SCALES, Trial, scales_of
from ipx2p.files import csv_text

ALL = ""  # the task of lines about all pictures
TRADE_OFF = ("clip_direction", "clip_image")
EFFECTIVE = tuple(f"effective_{name}" for name in SCALES)
# Column -> heading with unit, and digits behind the point (None: as it is).
COLUMNS: dict[str, tuple[str, int | None]] = {
    **{name: (name.replace("_", " "), None) for name in ("task", "guidance", *SCALES, *EFFECTIVE)},
    "sampler": ("sampler", None),
    "num_steps": ("steps", None),
    "edits": ("edits", None),
    "failed": ("not finite, edits", None),
    "evaluations": ("network evaluations per edit", None),
    "seconds": ("seconds per edit", 3),
    "shared": ("shared with", None),
    "best": ("best scales by", None),
    **{name: (metric.label, metric.digits) for name, metric in METRICS.items()},
}


@dataclass(frozen=True)
class Line:
    """One line of the table: settings (None is identity), and means over its edits.

    evaluations, seconds: infinite if no edit is finite. trade_off: means over the edits that have
    both of its metrics. shared: the earlier line with the same edits. best: metrics by which its
    scales are the best of its scheme at this cost.
    """

    settings: EditSettings | None
    task: str
    edits: int
    evaluations: float = 0.0
    seconds: float = 0.0
    means: dict[str, float] = field(default_factory=dict)
    failed: int = 0  # of the edits
    trade_off: dict[str, float] = field(default_factory=dict)
    shared: str | None = None
    best: tuple[str, ...] = ()

    @cached_property
    def scales(self) -> dict[str, float | None]:
        """Both scales by name; None for one that the guidance does not use."""
        return scales_of(self.settings)

    @cached_property
    def effective(self) -> tuple[float, float] | None:
        """Both scales at which ip2p is exactly the same, or None."""
        return self.settings.spec.effective_scales

    @property
    def place(self) -> tuple:
        """Its task and settings, the same in the table of other pictures."""
        return self.task, *vars(self.settings).values()

    def cells(self) -> dict[str, Any]:
        """The line by column; None where it has no value."""
        cells = {"task": self.task or "all", "edits": self.edits, "guidance": "identity"}
        if math.isfinite(self.evaluations):
            cells |= {"evaluations": self.evaluations, "seconds": self.seconds}
        cells |= self.means
        if self.settings is not None:
            cells |= asdict(self.settings) | self.scales
            cells |= {"failed": self.failed, "shared": self.shared}
            cells["best"] = ", ".join(self.best) or None
            cells |= zip(EFFECTIVE, self.effective or (None, None), strict=True)
        return {name: cells.get(name) for name in COLUMNS}


def make_lines(results: Results, metrics: Sequence[str]) -> list[Line]:
    """The lines of all pictures, then of each task if there are several."""
    trials = results.trials
    tasks = [*dict.fromkeys(trial.case.task for trial in trials)]
    order = [*dict.fromkeys(trial.settings.guidance for trial in trials)]
    first: dict[str, EditSettings] = {}
    for trial in trials:
        first.setdefault(trial.key, trial.settings)
    lines = []
    for task in (ALL, *(tasks if len(tasks) > 1 else ())):
        mine = [trial for trial in trials if task in (ALL, trial.case.task)]
        same = [results.identity(case) for case in dict.fromkeys(trial.case for trial in mine)]
        lines.append(Line(None, task, len(same), means=means_of(same, metrics)))
        groups: dict[tuple, list[Trial]] = {}
        for trial in mine:
            groups.setdefault(tuple(vars(trial.settings).values()), []).append(trial)
        made = [
            _line(group, task, results, metrics, first[group[0].key]) for group in groups.values()
        ]
        lines += sorted(made, key=lambda ln: (ln.evaluations, order.index(ln.settings.guidance)))
    return lines


def _line(
    group: Sequence[Trial],
    task: str,
    results: Results,
    metrics: Sequence[str],
    computed_for: EditSettings,
) -> Line:
    finite = [trial for trial in group if "failed" not in results.row(trial)]
    rows = [results.row(trial) for trial in finite]
    scores = [results.score(trial) for trial in finite]
    return Line(
        group[0].settings,
        task,
        len(group),
        evaluations=fmean(row["evaluations"] for row in rows) if rows else math.inf,
        seconds=median(row["seconds"] for row in rows) if rows else math.inf,
        means=means_of(scores, metrics),
        failed=len(group) - len(finite),
        trade_off=means_of(scores, TRADE_OFF, together=True),
        shared=None if computed_for == group[0].settings else _named(computed_for),
    )


def _named(settings: EditSettings) -> str:
    """Guidance and the scales that it uses."""
    scales = [f"{scale:g}" for scale in scales_of(settings).values() if scale is not None]
    return f"{settings.guidance} at {', '.join(scales)}" if scales else settings.guidance


def means_of(
    scores: Sequence[dict[str, float]], names: Sequence[str], *, together: bool = False
) -> dict[str, float]:
    """The mean of each metric over the edits that have it; together: that have all of them."""
    if together:
        scores = [score for score in scores if {*names} <= {*score}]
    values = {name: [score[name] for score in scores if name in score] for name in names}
    return {name: fmean(found) for name, found in values.items() if found}


def choose(lines: Sequence[Line], choosing: Sequence[Line]) -> list[Line]:
    """The same lines, the best scales of each scheme, sampler and cost among them marked.

    Args:
        choosing: lines of the same settings, for the pictures that decide.
    """
    deciding = {line.place: line.means for line in choosing if line.settings is not None}
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        if line.settings is not None:
            key = (line.task, line.settings.guidance, line.settings.sampler, line.evaluations)
            groups.setdefault(key, []).append(line)
    best: dict[int, list[str]] = {}
    for group, name in itertools.product(groups.values(), METRICS):
        measured = [line for line in group if name in line.means]
        if measured and METRICS[name].chooses:
            top = max(measured, key=lambda line: deciding[line.place].get(name, -math.inf))
            best.setdefault(id(top), []).append(name)
    return [replace(line, best=tuple(best.get(id(line), ()))) for line in lines]


def has_choice(lines: Sequence[Line]) -> bool:
    """Whether `choose` had several scales to choose from."""
    return len({line.best for line in lines if line.settings is not None and line.means}) > 1


def columns_of(lines: Sequence[Line]) -> list[str]:
    """Columns that say something: not a single task, nor effective scales that are as set."""
    guided = [line for line in lines if line.settings is not None]
    cells = [line.cells() for line in lines]
    as_set = all(line.effective in (None, (*line.scales.values(),)) for line in guided)
    idle = {
        "task": len({line.task for line in lines}) == 1,
        "failed": not any(line.failed for line in guided),
        "best": not has_choice(lines),
        **dict.fromkeys(EFFECTIVE, as_set),
    }
    for name in ("sampler", "num_steps"):  # the head of the report has one for all
        idle[name] = len({cell[name] for cell in cells} - {None}) == 1
    return [n for n in COLUMNS if not idle.get(n) and any(cell[n] is not None for cell in cells)]


def shown_value(name: str, value: Any) -> str:
    """One cell for people."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    digits = COLUMNS[name][1]
    return f"{value:g}" if digits is None else f"{value:.{digits}f}"


def markdown(lines: Sequence[Line]) -> str:
    """One table for each task and number of network evaluations."""
    columns = [name for name in columns_of(lines) if name not in ("task", "evaluations")]
    head = [f"| {' | '.join(COLUMNS[name][0] for name in columns)} |", "|" + "---|" * len(columns)]
    parts = []
    for title, group in _groups(lines):
        parts += [f"### {title}", "", *head]
        for cells in map(Line.cells, group):
            row = (escaped(shown_value(name, cells[name])) for name in columns)
            parts.append(f"| {' | '.join(row)} |")
        parts.append("")
    return "\n".join(parts)


def escaped(text: str) -> str:
    """Text as it is, in one line of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _groups(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Lines of one task and cost, each group led by the task's identity."""
    several = len({line.task for line in lines}) > 1
    identity = {line.task: line for line in lines if line.settings is None}
    guided = [line for line in lines if line.settings is not None]
    costs = itertools.groupby(guided, key=lambda line: (line.task, line.evaluations))
    for (task, cost), group in costs:
        prefix = f"{escaped(task or 'all')}: " if several else ""
        title = f"{cost:g} network evaluations per edit" if cost < math.inf else "no finite edit"
        yield prefix + title, [identity[task], *group]


def csv_of_lines(lines: Sequence[Line]) -> str:
    """The table for programs: all digits, the names of the columns as in the code."""
    return csv_text([*COLUMNS], (line.cells() for line in lines))


def csv_of_edits(results: Results) -> str:
    """One line for each edit: its row and its scores."""
    columns = [*dict.fromkeys(name for trial in results.trials for name in results.row(trial))]

    def cells(trial: Trial) -> dict[str, Any]:
        case = trial.case  # the row may be that of another case or scheme which shares the edit
        asked = {"picture": case.name, "source": case.source, "instruction": case.instruction}
        asked |= {"task": case.task} | asdict(trial.settings) | scales_of(trial.settings)
        return results.row(trial) | asked | results.score(trial)

    return csv_text(["picture", *columns, *METRICS], map(cells, results.trials))


def computed_on(results: Results) -> str:
    """How and on what device the edits were computed, since their seconds depend on it."""
    ways: dict[str, None] = {}
    for row in map(results.row, results.trials):
        place = row["device"].partition(":")[0]
        threads = f", {row['threads']} threads" if place == "cpu" else ""
        compiled = ", compiled" if row["compiled"] else ""
        branches = "" if row["batch_branches"] else ", one branch at a time"
        ways[
            f"{place} ({row['device_name']}{threads}), {row['dtype']}{compiled}, in batches of "
            f"{row['batch_size']}{branches}"
        ] = None
    several = " (seconds of different ones do not compare)" if len(ways) > 1 else ""
    return "; ".join(ways) + several
