"""Curves of a report, by matplotlib (the extra `plots`) (layer 4).

The trade-off is Fig. 8 of InstructPix2Pix (arXiv:2211.09800): how much of the picture is kept,
against how well its change follows that of the captions. Schemes that are exactly ip2p at other
scales are drawn at those; schemes that do not use a scale, at each of its values. Bars are 95 %
intervals. A Pareto front joins what nothing else beats in both respects.
"""

import importlib.util
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ipx2p.eval.grids import scales_of, variant_of
from ipx2p.eval.intervals import Estimate
from ipx2p.eval.lines import ALL, SCALES, TRADE_OFF, Line
from ipx2p.eval.plots import Series, draw_panels, draw_rows
from ipx2p.eval.records import IDENTITY, file_stem
from ipx2p.eval.scores import METRICS

LARGE_PANEL = (7.5, 6.0)
MAX_ROWS, MAX_COLUMNS = 24, 4  # of a figure that has a row for each line of the table
EVALUATIONS = "network evaluations per edit"
DIRECTIONS = (
    "to the right more of the instruction is done, upwards more of the picture is kept. Grey: the "
    "Pareto front."
)
NAMES = [name.replace("_", " ") for name in SCALES]
HOW_TO_GET = 'matplotlib is not installed: pip install -e ".[plots]", and run it again for curves'


class Curve(NamedTuple):
    """One figure: a name for its file, what it shows, and the PNG."""

    name: str
    caption: str
    png: bytes


def has_matplotlib() -> bool:
    """Whether curves can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def make_curves(lines: Sequence[Line]) -> list[Curve]:
    """All curves that these lines of the table allow.

    Each task has its own, since one may rise where another falls.
    """
    tasks = [*dict.fromkeys(line.task for line in lines)]
    curves = []
    for task in tasks[1:] or tasks:  # the first is of all tasks together
        for curve in _curves_of_task([line for line in lines if line.task == task]):
            if task != ALL:
                name, caption = file_stem(task, curve.name), f"{task}: {curve.caption}"
                curve = curve._replace(name=name, caption=caption)
            curves.append(curve)
    return curves


def _curves_of_task(lines: Sequence[Line]) -> list[Curve]:
    edits = [line for line in lines if not line.is_built_in and line.scores]
    identity = next((line.means for line in lines if line.model == IDENTITY), {})
    measured = [name for name in METRICS if any(name in line.scores for line in edits)]
    choosing = [name for name in measured if METRICS[name].chooses]
    guided = [line for line in edits if line.settings is not None]
    swept = [line for line in guided if len(_alike(line, guided)) > 1]
    curves = []
    for how in dict.fromkeys(_how(line) for line in swept):
        mine = [line for line in guided if _how(line) == how]
        if traded := [line for line in mine if line.trade_off]:
            curves.append(_over_scales(traded, None, identity))
        for metric in choosing or [name for name in measured if name == "change"]:
            if there := [line for line in mine if metric in line.scores]:
                curves.append(_over_scales(there, metric, identity))
    for metric in choosing:
        best = [line for line in edits if metric in line.best or line not in swept]
        best = [line for line in best if metric in line.scores]
        if len({line.evaluations for line in best}) > 1:
            curves.append(_against_evaluations(best, metric, identity.get(metric, math.nan)))
    if not swept:
        if len([line for line in edits if line.trade_off]) > 1:
            curves.append(_trade_off_of_lines([line for line in lines if line.trade_off]))
        if measured and len(lines) <= MAX_ROWS:
            curves.append(_intervals(lines, choosing or measured))
    return curves


def _alike(line: Line, lines: Sequence[Line]) -> list[Line]:
    """Those that differ from it in scales alone."""
    return [other for other in lines if variant_of(other) == variant_of(line)]


def _how(line: Line) -> tuple[str, int]:
    return line.settings["sampler"], line.settings["num_steps"]


def _series_names(lines: Sequence[Line]) -> dict[tuple, str]:
    """Model, scheme and sampler, as far as they differ; the scheme if nothing does."""
    parts = {}
    for line in lines:
        settings = line.settings or {}
        own = (line.model, settings.get("guidance", ""), settings.get("sampler", ""))
        parts[variant_of(line)] = own
    differ = [len({*column} - {""}) > 1 for column in zip(*parts.values(), strict=True)]
    differ = differ if any(differ) else [False, True, False]
    return {
        variant: ", ".join(filter(None, itertools.compress(own, differ))) or own[0]
        for variant, own in parts.items()
    }


def _over_scales(lines: Sequence[Line], metric: str | None, identity: dict[str, float]) -> Curve:
    """A metric against one scale, with a panel for each value of the other; None: the trade-off."""
    lines, sampler, steps = _at_all_values(lines), *_how(lines[0])
    names = _series_names(lines)
    along = 1 if metric is None else 0
    if len({scales_of(line)[along] for line in lines}) == 1:
        along = 1 - along
    across = 1 - along
    nominal = {variant_of(line) for line in lines if line.effective is None}

    def at(line: Line) -> float:
        """Its place along the scale: the effective scale, else as it was set."""
        exact = variant_of(line) not in nominal and SCALES[along] not in line.settings["unused"]
        return (line.effective if exact else scales_of(line))[along]

    is_moved = any(at(line) != scales_of(line)[along] for line in lines)
    groups: dict[tuple, list[Line]] = {}
    for line in sorted(lines, key=lambda line: (scales_of(line)[across], scales_of(line)[along])):
        groups.setdefault((scales_of(line)[across], variant_of(line)), []).append(line)
    panels: dict[str, list[Series]] = {}
    for (value, variant), group in groups.items():
        texts = []
        if metric is not None:
            points = [(at(line), line.scores[metric]) for line in group]
        else:
            points = [_traded(line) for line in group]
            if SCALES[along] in group[0].settings["unused"]:
                points = points[:1]
            else:
                texts = [f"{at(line):g}" for line in group]
        note = " (nominal scale)" if is_moved and variant in nominal else ""
        title = "" if value is None else f"{NAMES[across]} {value:g}"
        panels.setdefault(title, []).append(Series(names[variant] + note, points, texts))
    how, file = f"{sampler}, {steps} steps", f"{sampler}_{steps}_steps"
    name = f"{'effective ' if is_moved else ''}{NAMES[along]}"
    if metric is None:
        x, y = (METRICS[one].label for one in TRADE_OFF)
        caption = (
            f"Trade-off at {how}: {DIRECTIONS} Points are labelled by {name}, where there is room."
        )
        png = draw_panels(panels, x, y, size=LARGE_PANEL, front=(1, 1))
        return Curve(f"trade_off_{file}", caption, png)
    label = METRICS[metric].label
    caption = f"{label} against {name}, at {how}: {METRICS[metric].about}."
    png = draw_panels(panels, name, label, identity.get(metric, math.nan))
    return Curve(f"{metric}_scale_{file}", caption, png)


def _traded(line: Line) -> tuple[float, Estimate]:
    """Its place in the trade-off, with the interval of y if that is over the same edits."""
    x, y = (line.trade_off[name] for name in TRADE_OFF)
    score = line.scores[TRADE_OFF[1]]
    return x, score if math.isclose(score.mean, y) else Estimate(y)


def _grouped(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of each model and scheme, by cost."""
    names = _series_names(lines)
    groups: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.evaluations):
        groups.setdefault(names[variant_of(line)], []).append(line)
    return groups


def _against_evaluations(lines: Sequence[Line], metric: str, identity: float) -> Curve:
    panel = [
        Series(label, [(line.evaluations, line.scores[metric]) for line in group])
        for label, group in _grouped(lines).items()
    ]
    label, better = METRICS[metric].label, (-1, METRICS[metric].better)
    caption = (
        f"{label} against network evaluations, each model or scheme at the best of its scales. "
        f"Grey: the Pareto front. {label}: {METRICS[metric].about}."
    )
    png = draw_panels({"": panel}, EVALUATIONS, label, identity, integer=True, front=better)
    return Curve(f"{metric}_evaluations", caption, png)


def _trade_off_of_lines(lines: Sequence[Line]) -> Curve:
    """One point for each line."""
    panel = []
    for label, group in _grouped(lines).items():
        texts = [f"{line.settings['num_steps']} steps" for line in group if len(group) > 1]
        panel.append(Series(label, [*map(_traded, group)], texts))
    x, y = (METRICS[one].label for one in TRADE_OFF)
    caption = f"Keeping the source against following the instruction: {DIRECTIONS}"
    png = draw_panels({"": panel}, x, y, size=LARGE_PANEL, front=(1, 1))
    return Curve("trade_off", caption, png)


def _intervals(lines: Sequence[Line], metrics: Sequence[str]) -> Curve:
    """A row for each line, a panel for each metric, and in it the mean with its interval."""
    columns = {
        METRICS[name].label: [line.scores.get(name) for line in lines]
        for name in metrics[:MAX_COLUMNS]
    }
    png = draw_rows([line.label for line in lines], columns, [line.is_built_in for line in lines])
    caption = "Means and 95 % intervals over pictures; in grey the rows that every report has."
    return Curve("intervals", caption, png)


def _at_all_values(lines: Sequence[Line]) -> list[Line]:
    """The lines; one that does not use a scale, once for each value that others have."""
    spread = [replace(line, settings=line.settings | {"unused": _unused(line)}) for line in lines]
    for name in SCALES:
        values = sorted({line.scales[name] for line in lines} - {None}) or [None]
        spread = [
            replace(line, settings=line.settings | {name: value})
            for line in spread
            for value in (values if line.scales[name] is None else [line.scales[name]])
        ]
    return spread


def _unused(line: Line) -> list[str]:
    return [name for name, value in line.scales.items() if value is None]
