"""A sweep as tables: means over pictures and seeds, in Markdown and CSV (layer 4).

Seconds are medians: the first edit of a run, and what else the machine did, must not count.

Lines are ordered by task and by network evaluations, so that schemes of equal cost stand beside
each other. `identity` is the source unchanged, which every edit has to beat.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from ipx2p.editing.settings import EditSettings
from ipx2p.errors import InputError
from ipx2p.eval.cases import Case
from ipx2p.eval.features import ClipFeatures
from ipx2p.eval.rows import Rows
from ipx2p.eval.scores import METRICS, identity_key, score_key
from ipx2p.eval.sweep import SCALES, Trial, scales_of

ALL = ""  # stands for the pictures of all tasks
TRADE_OFF = ("clip_direction", "clip_image")
# Column -> heading with unit, and digits behind the point (None: as it is).
COLUMNS: dict[str, tuple[str, int | None]] = {
    "task": ("task", None),
    "guidance": ("guidance", None),
    "guidance_scale": ("guidance scale", None),
    "image_guidance_scale": ("image guidance scale", None),
    "effective_guidance_scale": ("effective guidance scale", None),
    "effective_image_guidance_scale": ("effective image guidance scale", None),
    "sampler": ("sampler", None),
    "num_steps": ("steps", None),
    "edits": ("edits", None),
    "failed": ("not finite, edits", None),
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
    failed: int = 0  # of the edits
    trade_off: dict[str, float] = field(default_factory=dict)  # means over those that have both

    @cached_property
    def scales(self) -> dict[str, float | None]:
        """Both scales by name; None for one that the guidance does not use."""
        return scales_of(self.settings)

    @cached_property
    def effective(self) -> dict[str, float | None]:
        """Likewise those at which ip2p is exactly the same, where there are such."""
        return dict(zip(SCALES, self.settings.spec.effective_scales or (None, None), strict=True))

    def cells(self) -> dict[str, Any]:
        """The line by column; what it does not have is None."""
        told = {"task": self.task or "all", "edits": self.edits, "guidance": "identity"}
        costs = {"evaluations": self.evaluations, "seconds": self.seconds}
        told |= {name: value for name, value in costs.items() if not math.isnan(value)}
        told |= self.means
        if self.settings is not None:
            for name in ("guidance", "sampler", "num_steps"):
                told[name] = getattr(self.settings, name)
            told |= self.scales | {"failed": self.failed}
            told |= {f"effective_{name}": scale for name, scale in self.effective.items()}
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
        lines.append(
            Line(None, task, len(cases), means=_means(same, metrics), trade_off=_trade_off(same))
        )
        groups: dict[tuple, list[Trial]] = {}
        for trial in mine:
            groups.setdefault(_values(trial.settings), []).append(trial)
        made = [_line(group, task, rows, scores, clip, metrics) for group in groups.values()]
        lines += sorted(made, key=lambda line: (_cost(line), order.index(line.settings.guidance)))
    return lines


def _cost(line: Line) -> float:
    """Network evaluations; lines of nothing finite come last."""
    return math.inf if math.isnan(line.evaluations) else line.evaluations


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
    finite = [trial for trial in group if "failed" not in rows.by_key[trial.key]]
    costs = [rows.by_key[trial.key] for trial in finite]
    evaluations = [cost["evaluations"] for cost in costs] or [math.nan]
    measured = [_scores(trial.key, trial.case, scores, clip) for trial in finite]
    return Line(
        group[0].settings,
        task,
        len(group),
        failed=len(group) - len(finite),
        evaluations=math.fsum(evaluations) / len(evaluations),
        seconds=median([cost["seconds"] for cost in costs] or [math.nan]),
        means=_means(measured, metrics),
        trade_off=_trade_off(measured),
    )


def _scores(edit: str, case: Case, scores: Rows, clip: ClipFeatures | None) -> dict[str, float]:
    return scores.by_key[score_key(edit, case, clip)]


def _means(measured: Sequence[dict[str, float]], metrics: Sequence[str]) -> dict[str, float]:
    """Means over the edits that have the metric."""
    there = {name: [one[name] for one in measured if name in one] for name in metrics}
    return {name: sum(values) / len(values) for name, values in there.items() if values}


def _trade_off(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    return _means([one for one in measured if "clip_direction" in one], TRADE_OFF)


def columns_of(lines: Sequence[Line]) -> list[str]:
    """Columns that say something: one task, or scales that act as they are, need none."""
    guided = [line for line in lines if line.settings is not None]
    idle = set()
    if len({line.task for line in lines}) == 1:
        idle.add("task")
    if not any(line.failed for line in guided):
        idle.add("failed")
    if all(line.effective == line.scales for line in guided):
        idle |= {f"effective_{name}" for name in SCALES}
    cells = [line.cells() for line in lines]
    for name in ("sampler", "num_steps"):  # one for all stands in the head of the report
        if len({cell[name] for cell in cells} - {None}) == 1:
            idle.add(name)
    return [n for n in COLUMNS if n not in idle and any(cell[n] is not None for cell in cells)]


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
            shown = (escaped(shown_value(name, cells[name])) for name in columns)
            parts.append("| " + " | ".join(shown) + " |")
        parts.append("")
    return "\n".join(parts)


def escaped(text: str) -> str:
    """Text in one line of Markdown, as it is."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _groups(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Lines of one task and cost, each group led by the task's identity."""
    several = len({line.task for line in lines}) > 1
    groups: dict[tuple[str, float], list[Line]] = {}
    identity = {line.task: line for line in lines if line.settings is None}
    for line in lines:
        if line.settings is not None:
            groups.setdefault((line.task, _cost(line)), [identity[line.task]]).append(line)
    for (task, cost), group in groups.items():
        prefix = f"{escaped(task or 'all')}: " if several else ""
        title = f"{cost:g} network evaluations per edit" if cost < math.inf else "no finite edit"
        yield prefix + title, group


def csv_of_lines(lines: Sequence[Line]) -> str:
    """The table for programs: all digits, the names of the columns as in the code."""
    columns = [*COLUMNS]
    return _csv(columns, ([line.cells()[name] for name in columns] for line in lines))


def csv_of_edits(
    trials: Sequence[Trial], rows: Rows, scores: Rows, clip: ClipFeatures | None
) -> str:
    """One line for each edit: its row and its scores."""
    columns = [*dict.fromkeys(name for trial in trials for name in rows.by_key[trial.key])]

    def line(trial: Trial) -> list[Any]:
        row = rows.by_key[trial.key]
        measured = {} if "failed" in row else _scores(trial.key, trial.case, scores, clip)
        case = trial.case  # an edit may have been made for another one, or typed otherwise
        row = row | asdict(trial.settings) | scales_of(trial.settings)
        row |= {"source": case.source, "instruction": case.instruction, "task": case.task}
        return [
            trial.case.name,
            *(row.get(name) for name in columns),
            *(measured.get(name) for name in METRICS),
        ]

    return _csv(["picture", *columns, *METRICS], map(line, trials))


def _csv(columns: Sequence[str], lines: Iterator[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return file.getvalue()


def computed_on(trials: Sequence[Trial], rows: Rows) -> str:
    """What the edits were computed on, and how: their seconds hang on it."""
    ways: dict[str, None] = {}
    for row in (rows.by_key[trial.key] for trial in trials):
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


def check_complete(trials: Sequence[Trial], rows: Rows) -> None:
    """Raise InputError when edits are missing that should be there."""
    lost = [trial for trial in trials if trial.key not in rows.by_key]
    if lost:
        raise InputError(
            f"{len(lost)} of {len(trials)} edits are not in {rows.folder}: run it again"
        )
