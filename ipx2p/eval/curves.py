"""Curves of a report, by matplotlib (the extra `plots`) (layer 4).

A trade-off shows how much of the picture is kept against how well the edit follows; by CLIP it is
Fig. 8 of InstructPix2Pix (arXiv:2211.09800). It is drawn over both scales, and over each knob while
the others are fixed. Schemes that are exactly ip2p at other scales are drawn at those; schemes that
do not use a scale, at each of its values. Bars are 95 % intervals. A Pareto front joins what
nothing else beats in both respects.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import NamedTuple

from ipx2p.eval.intervals import Estimate
from ipx2p.eval.lines import ALL, SCALES, Line, sortable
from ipx2p.eval.plots import Series, draw_panels, draw_rows
from ipx2p.eval.records import IDENTITY, file_stem
from ipx2p.eval.scores import METRICS
from ipx2p.eval.sweeps import series_of, sweeps_of

TRADE_OFF = ("clip_direction", "clip_image")
PLANES = {  # name -> following, to the right, and keeping, upwards
    "trade_off": TRADE_OFF,
    "trade_off_pixels": ("psnr", "outside_haarpsi"),
    "trade_off_outside": ("clip_direction", "outside_haarpsi"),
}
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
    variants = [_variant(line) for line in guided]
    swept = [line for line in guided if variants.count(_variant(line)) > 1]
    curves = []
    for how in dict.fromkeys(_how(line) for line in swept):
        mine = [line for line in guided if _how(line) == how]
        for plane in PLANES.values():
            if traded := _traded(mine, plane):
                curves.append(_over_scales(traded, plane, math.nan))
        for metric in choosing or [name for name in measured if name == "change"]:
            if there := [line for line in mine if metric in line.scores]:
                curves.append(_over_scales(there, (metric,), identity.get(metric, math.nan)))
    for metric in choosing:
        best = [line for line in edits if metric in line.best or line not in swept]
        best = [line for line in best if metric in line.scores]
        if len({line.evaluations for line in best}) > 1:
            curves.append(_against_evaluations(best, metric, identity.get(metric, math.nan)))
    for plane in PLANES.values():
        curves += _over_knobs(_traded(guided, plane), plane)
        if not swept and len(_traded(edits, plane)) > 1:
            curves.append(_trade_off_of_lines(_traded(lines, plane), plane))
    if not swept and measured and len(lines) <= MAX_ROWS:
        curves.append(_intervals(lines, choosing or measured))
    return curves


def _variant(line: Line) -> tuple:
    """Equal for lines that differ in scales alone."""
    return *line.scheme, (line.settings or {}).get("num_steps")


def _how(line: Line) -> tuple[str, int]:
    return line.settings["sampler"], line.settings["num_steps"]


def _over_scales(lines: Sequence[Line], metrics: Sequence[str], identity: float) -> Curve:
    """A metric against one scale, with a panel for each value of the other; two are traded off."""
    used = [sorted({line.scales[index] for line in lines} - {None}) for index in (0, 1)]
    metric, is_plane = metrics[0], len(metrics) > 1
    along = 1 if is_plane else 0
    if len(used[along]) < 2:
        along = 1 - along
    series, (sampler, steps) = series_of(lines), _how(lines[0])
    nominal = {label for label, some in series.items() if None in [ln.effective for ln in some]}
    is_moved = any(
        line.scales[along] not in (None, line.effective[along])
        for label, some in series.items()
        for line in some
        if label not in nominal
    )
    panels = {}
    for value in used[1 - along] or [None]:
        panel = panels["" if value is None else f"{NAMES[1 - along]} {value:g}"] = []
        for label, some in series.items():
            mine = [line for line in some if line.scales[1 - along] in (None, value)]
            mine.sort(key=lambda line: sortable(line.scales[along]))
            places = [(ln.scales if label in nominal else ln.effective)[along] for ln in mine]
            is_used = all(line.scales[along] is not None for line in mine)
            if is_plane:
                points, texts = _places(mine, metrics), [f"{at:g}" for at in places if is_used]
            elif is_used:
                points, texts = [*zip(places, (ln.scores[metric] for ln in mine), strict=True)], []
            else:  # it is the same at every value
                points, texts = [(at, mine[0].scores[metric]) for at in used[along]], []
            note = " (nominal scale)" if is_moved and label in nominal else ""
            if mine:
                panel.append(Series(label + note, points, texts))
    how, file = f"{sampler}, {steps} steps", f"{sampler}_{steps}_steps"
    name = f"{'effective ' if is_moved else ''}{NAMES[along]}"
    if is_plane:
        labelled = f"Points are labelled by {name}, where there is room."
        return _trade_off(panels, metrics, f"_{file}", f"Trade-off at {how}", labelled)
    label = METRICS[metric].label
    caption = f"{label} against {name}, at {how}: {METRICS[metric].about}."
    return Curve(f"{metric}_scale_{file}", caption, draw_panels(panels, name, label, identity))


def _trade_off(
    panels: dict[str, list[Series]], plane: Sequence[str], file: str, title: str, more: str
) -> Curve:
    name = next(name for name, metrics in PLANES.items() if metrics == plane)
    labels = [METRICS[metric].label for metric in plane]
    about = " ".join(f"{METRICS[metric].label}: {METRICS[metric].about}." for metric in plane)
    png = draw_panels(panels, *labels, size=LARGE_PANEL, front=(1, 1))
    return Curve(name + file, " ".join(filter(None, (f"{title}:", DIRECTIONS, more, about))), png)


def _traded(lines: Sequence[Line], plane: Sequence[str]) -> list[Line]:
    """Those that have a place in the trade-off."""
    return [line for line in lines if {*plane} <= {*line.scores}]


def _places(lines: Sequence[Line], plane: Sequence[str]) -> list[tuple[Estimate, Estimate]]:
    return [tuple(line.scores[name] for name in plane) for line in lines]


def _over_knobs(lines: Sequence[Line], plane: Sequence[str]) -> list[Curve]:
    """The trade-off with a line for each sweep of a knob; none if one scale alone was swept."""
    sweeps = sweeps_of(lines)
    knobs = {sweep.knob for sweep in sweeps if sweep.knob}
    if len(knobs) < 2 and knobs <= {*NAMES}:
        return []
    panel = [
        Series(
            ", ".join(filter(None, (sweep.of, sweep.knob))),
            _places(sweep.lines, plane),
            [f"{value:g}" for value in sweep.values],
        )
        for sweep in sweeps
    ]
    through = "; ".join(dict.fromkeys(sweep.through for sweep in sweeps if sweep.knob))
    more = f"One line for each knob, the others fixed at {through}."
    return [_trade_off({"": panel}, plane, "_knobs", "Trade-off by knob", more)]


def _against_evaluations(lines: Sequence[Line], metric: str, identity: float) -> Curve:
    panel = [
        Series(label, [(line.evaluations, line.scores[metric]) for line in some])
        for label, some in series_of(sorted(lines, key=lambda line: line.evaluations)).items()
    ]
    label, better = METRICS[metric].label, (-1, METRICS[metric].better)
    caption = (
        f"{label} against network evaluations, each model or scheme at the best of its scales. "
        f"Grey: the Pareto front. {label}: {METRICS[metric].about}."
    )
    png = draw_panels({"": panel}, EVALUATIONS, label, identity, integer=True, front=better)
    return Curve(f"{metric}_evaluations", caption, png)


def _trade_off_of_lines(lines: Sequence[Line], plane: Sequence[str]) -> Curve:
    """One point for each line."""
    lines = [line for line in lines if math.isfinite(line.means[plane[0]])]  # but for the oracle
    panel = []
    for label, some in series_of(lines).items():
        texts = [f"{line.settings['num_steps']} steps" for line in some if len(some) > 1]
        panel.append(Series(label, _places(some, plane), texts))
    title = "Keeping the source against following the instruction"
    return _trade_off({"": panel}, plane, "", title, "")


def _intervals(lines: Sequence[Line], metrics: Sequence[str]) -> Curve:
    """A row for each line, a panel for each metric, and in it the mean with its interval."""
    columns = {
        METRICS[name].label: [line.scores.get(name) for line in lines]
        for name in metrics[:MAX_COLUMNS]
    }
    png = draw_rows([line.label for line in lines], columns, [line.is_built_in for line in lines])
    caption = "Means and 95 % intervals over pictures; built-in rows in grey."
    return Curve("intervals", caption, png)
