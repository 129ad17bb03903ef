"""Curves of a sweep, by matplotlib (the extra `plots`) (layer 4).

The trade-off is Fig. 8 of InstructPix2Pix (arXiv:2211.09800): how much of the picture is kept,
against how well its change follows that of the captions. Schemes that are exactly ip2p at other
scales are drawn at those; schemes that do not use a scale, at each of its values.
"""

import importlib.util
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ipx2p.eval.rows import file_stem
from ipx2p.eval.scores import METRICS
from ipx2p.eval.sweep import SCALES
from ipx2p.eval.tables import ALL, COLUMNS, TRADE_OFF, Line

MARKERS = "osD^v<>P*Xh"  # one more than colours, so that both repeat together only after 110
# One for each sampler, as matplotlib writes them: an offset, then lengths of ink and gap
DASHES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 3)))
# Where a label may be, in points from its own point: near it, else farther away.
OFFSETS = [(6, 4), (6, -11), (-6, 4), (-6, -11), (0, 8), (0, -15), (9, -4), (-9, -4)]
OFFSETS += [(2 * x, 2 * y) for x, y in OFFSETS]
PANEL = (5.0, 4.2)  # inches
LARGE_PANEL = (7.5, 6.0)
NAMES = [COLUMNS[name][0] for name in SCALES]
HOW_TO_GET = 'matplotlib is not installed: pip install -e ".[plots]", and run it again for curves'


class Curve(NamedTuple):
    """One figure: a name for its file, what it shows, and the PNG."""

    name: str
    caption: str
    png: bytes


class Series(NamedTuple):
    """One line of a figure: its name in the legend, its look, (x, y), and texts beside those."""

    label: str
    look: dict[str, Any]
    points: list[tuple[float, float]]
    texts: Sequence[str] = ()


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
    guided = [line for line in lines if line.settings is not None and line.means]
    identity = next(line for line in lines if line.settings is None).means
    choosing = [name for name in identity if METRICS[name].chooses]
    curves = []
    for how in dict.fromkeys((line.settings.sampler, line.settings.num_steps) for line in guided):
        mine = [ln for ln in guided if (ln.settings.sampler, ln.settings.num_steps) == how]
        if "clip_direction" in identity and any(line.trade_off for line in mine):
            curves.append(_over_scales([ln for ln in mine if ln.trade_off], None, identity))
        if len({_scales(line) for line in mine}) > 1:
            for metric in choosing or [name for name in ["change"] if name in identity]:
                if there := [line for line in mine if metric in line.means]:
                    curves.append(_over_scales(there, metric, identity))
    for metric in choosing:
        if there := [line for line in guided if metric in line.best]:
            curves.append(_against_evaluations(there, metric, identity[metric]))
    return curves


def _over_scales(lines: Sequence[Line], metric: str | None, identity: dict[str, float]) -> Curve:
    """A metric against one scale, with a panel for each value of the other; None: the trade-off."""
    lines = _at_all_values(lines)
    along = 1 if metric is None else 0
    if len({_scales(line)[along] for line in lines}) == 1:
        along = 1 - along
    across = 1 - along
    nominal = {line.settings.guidance for line in lines if line.effective is None}

    def uses_scale(line: Line) -> bool:
        return [*line.scales.values()][along] is not None

    def at(line: Line) -> float:
        """Its place along the scale: the effective scale, else as it was set."""
        exact = line.settings.guidance not in nominal and uses_scale(line)
        return (line.effective if exact else _scales(line))[along]

    is_moved = any(at(line) != _scales(line)[along] for line in lines)
    style = _styles(lines)
    groups: dict[tuple[float, str], list[Line]] = {}
    for line in sorted(lines, key=lambda line: (_scales(line)[across], _scales(line)[along])):
        groups.setdefault((_scales(line)[across], line.settings.guidance), []).append(line)
    panels: dict[str, list[Series]] = {}
    for (value, scheme), group in groups.items():
        texts = []
        if metric is not None:
            points = [(at(line), line.means[metric]) for line in group]
        else:
            points = [tuple(line.trade_off[name] for name in TRADE_OFF) for line in group]
            if uses_scale(group[0]):
                texts = [f"{at(line):g}" for line in group]
            else:
                points = points[:1]
        note = " (nominal scale)" if is_moved and scheme in nominal else ""
        series = Series(f"{scheme}{note}", style[scheme], points, texts)
        panels.setdefault(f"{NAMES[across]} {value:g}", []).append(series)
    settings = lines[0].settings
    how, file = f"{settings.sampler}, {settings.num_steps} steps", f"{settings.num_steps}_steps"
    name = f"{'effective ' if is_moved else ''}{NAMES[along]}"
    if metric is None:
        x, y = (METRICS[one].label for one in TRADE_OFF)
        caption = (
            f"Trade-off at {how}: to the right more of the instruction is done, upwards more of "
            f"the picture is kept. Points are labelled by {name}, where there is room."
        )
        png = _panels(panels, x, y, size=LARGE_PANEL)
        return Curve(f"trade_off_{settings.sampler}_{file}", caption, png)
    label = METRICS[metric].label
    caption = f"{label} against {name}, at {how}: {METRICS[metric].about}."
    png = _panels(panels, name, label, identity[metric])
    return Curve(f"{metric}_scale_{settings.sampler}_{file}", caption, png)


def _against_evaluations(lines: Sequence[Line], metric: str, identity: float) -> Curve:
    style = _styles(lines)
    samplers = sorted({line.settings.sampler for line in lines})
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.evaluations):
        groups.setdefault((line.settings.guidance, line.settings.sampler), []).append(line)
    panel = []
    for (scheme, sampler), group in groups.items():
        points = [(line.evaluations, line.means[metric]) for line in group]
        look, label = style[scheme], scheme
        if len(samplers) > 1:
            look = look | {"linestyle": DASHES[samplers.index(sampler)]}
            label = f"{scheme}, {sampler}"
        panel.append(Series(label, look, points))
    label = METRICS[metric].label
    caption = (
        f"{label} against network evaluations, each scheme at the best of its scales; one line for "
        "each sampler."
    )
    png = _panels({"": panel}, "network evaluations per edit", label, identity, integer=True)
    return Curve(f"{metric}_evaluations", caption, png)


def _at_all_values(lines: Sequence[Line]) -> list[Line]:
    """The lines; one that does not use a scale, once for each value that others have."""
    spread = [*lines]
    for name in SCALES:
        values = sorted({line.scales[name] for line in lines} - {None})
        spread = [
            replace(line, settings=replace(line.settings, **{name: value}))
            for line in spread
            for value in (values if line.scales[name] is None else [])
            or [getattr(line.settings, name)]
        ]
    return spread


def _scales(line: Line) -> tuple[float, float]:
    """As they were set."""
    return line.settings.guidance_scale, line.settings.image_guidance_scale


def _styles(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """How the line of each scheme looks; the same in all figures of the same schemes."""
    from matplotlib import colormaps

    colors = colormaps["tab10"].colors
    return {
        scheme: {
            "color": colors[place % len(colors)],
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 5,
            "linestyle": "-" if place < len(colors) else "-.",
            "linewidth": 1.4,
        }
        for place, scheme in enumerate(sorted({line.settings.guidance for line in lines}))
    }


def _panels(
    panels: dict[str, list[Series]],
    x: str,
    y: str,
    identity: float = math.nan,
    *,
    size: tuple[float, float] = PANEL,
    integer: bool = False,
) -> bytes:
    """A PNG of panels by title, with one legend beside them. integer: ticks at whole numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=110)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes in grid[len(panels) :]:
        axes.remove()
    grid = grid[: len(panels)]
    for axes, (title, panel) in zip(grid, panels.items(), strict=True):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=integer))
        axes.margins(0.12 if any(series.texts for series in panel) else 0.05)
        for series in panel:
            # An infinite PSNR cannot be drawn.
            points = [p if math.isfinite(p[1]) else (p[0], math.nan) for p in series.points]
            axes.plot(*zip(*points, strict=True), label=series.label, **series.look)
    if math.isfinite(identity):
        _draw_identity(grid, identity)
    named = (pair for axes in grid for pair in zip(*axes.get_legend_handles_labels(), strict=True))
    handles = {label: handle for handle, label in named}
    # The legend is beside the panels; where it is higher than they are, it makes them higher.
    width = size[0] * columns + 0.075 * max(map(len, handles)) + 1.2
    figure.set_size_inches(width, max(size[1] * rows, 0.24 * len(handles) + 0.8))
    figure.legend([*handles.values()], [*handles], loc="outside right upper", fontsize=8)
    for axes, panel in zip(grid, panels.values(), strict=True):
        labels = [
            (*point, text, series.look["color"])
            for series in panel
            for point, text in zip(series.points, series.texts, strict=bool(series.texts))
        ]
        _place_labels(axes, labels)  # last, when everything has its size
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_identity(grid: Sequence[Any], value: float) -> None:
    """A dashed line where it is near the curves; far away it would flatten them."""
    low, high = grid[0].get_ylim()  # the panels share it
    near = low - (high - low) < value < high + (high - low)
    label = f"identity, {value:.4g}{'' if near else ' (outside)'}"
    for axes in grid:
        shown = axes.axhline(value) if near else axes.plot([], [])[0]
        shown.set(color="0.4", linestyle="--", linewidth=1.2, label=label)


def _place_labels(axes: Any, labels: Sequence[tuple[float, float, str, Any]]) -> None:
    """Write labels (x, y, text, colour) beside their points, if possible clear of the lines.

    Labels that would cover others are left out.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    if not labels:
        return
    axes.figure.draw_without_rendering()  # so that data have places in pixels
    marks, written = [], []
    for line in axes.lines:
        places = axes.transData.transform(line.get_path().interpolated(16).vertices)
        for index, (x, y) in enumerate(places):
            half = 2 if index % 16 else 5  # every 16th is a marker
            marks.append(Bbox.from_extents(x - half, y - half, x + half, y + half))
    for x, y, text, color in labels:
        for others, (dx, dy) in itertools.product(([*marks, *written], written), OFFSETS):
            label = axes.annotate(
                text,
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="right" if dx < 0 else "center" if dx == 0 else "left",
                fontsize=8,
                color=color,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
            box = label.get_window_extent()
            if not others or not box.count_overlaps(others):
                written.append(box)
                break
            label.remove()
