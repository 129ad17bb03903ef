"""How curves are drawn: panels of lines with intervals, Pareto fronts, labels (layer 4).

Needs matplotlib (the extra `plots`).
"""

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ipx2p.eval.intervals import Estimate

MARKERS = "osD^v<>P*Xh"  # one more than colours, so that both repeat together only after 110
# Where a label may be, in points from its own point: near it, else farther away.
OFFSETS = [(6, 4), (6, -11), (-6, 4), (-6, -11), (0, 8), (0, -15), (9, -4), (-9, -4)]
OFFSETS += [(2 * x, 2 * y) for x, y in OFFSETS]
PANEL = (5.0, 4.2)  # inches


@dataclass(frozen=True)
class Series:
    """One line of a figure: its name in the legend, (x, y), texts beside the points."""

    label: str
    points: Sequence[tuple[float | Estimate, Estimate]]
    texts: Sequence[str] = ()


def pareto(points: Sequence[Sequence[float]], better: Sequence[int]) -> list[bool]:
    """Which points no other one is better than in one coordinate, and as good in all.

    Args:
        better: 1 if high, -1 if low, for each coordinate.
    """
    values = [tuple(x * sign for x, sign in zip(one, better, strict=True)) for one in points]

    def is_beaten(one: tuple) -> bool:
        return any(
            other != one and all(a >= b for a, b in zip(other, one, strict=True))
            for other in values
        )

    return [not any(map(math.isnan, one)) and not is_beaten(one) for one in values]


def _mean(place: float | Estimate) -> float:
    return place.mean if isinstance(place, Estimate) else place


def _bars(score: float | Estimate) -> tuple[float, float]:
    """How far its interval reaches below and above; 0 without one."""
    if not isinstance(score, Estimate) or score.low is None or score.high is None:
        return 0.0, 0.0
    return score.mean - score.low, score.high - score.mean


def _figure(
    rows: int, columns: int, size: tuple[float, float], *, same_y: bool = True
) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=same_y).flatten()
    for axes in grid:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    return figure, [*grid]


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def draw_rows(
    labels: Sequence[str], columns: dict[str, Sequence[Estimate | None]], grey: Sequence[bool]
) -> bytes:
    """A PNG with a row for each label, and a panel of points with intervals for each column."""
    size = (3.6 * len(columns) + 2, 0.3 * len(labels) + 1.1)
    figure, grid = _figure(1, len(columns), size)
    for axes, (title, column) in zip(grid, columns.items(), strict=True):
        axes.set_xlabel(title)
        for row, score in enumerate(column):
            if score is not None and math.isfinite(score.mean):
                color = "0.55" if grey[row] else "tab:blue"
                bars = [[reach] for reach in _bars(score)]
                axes.errorbar(score.mean, row, xerr=bars, fmt="o", color=color, capsize=3)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(labelleft=axes is grid[0])
    return _png(figure)


def draw_panels(
    panels: dict[str, list[Series]],
    x: str,
    y: str,
    identity: float = math.nan,
    *,
    size: tuple[float, float] = PANEL,
    integer: bool = False,
    same_y: bool = True,
    front: tuple[int, int] | None = None,
) -> bytes:
    """A PNG of panels by title, with one legend beside them.

    Args:
        integer: ticks at whole numbers. same_y: one range of y for all panels. front: draw the
            Pareto front of all points of a panel; 1 where more is better, -1 where less is, for x
            and y.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = _figure(rows, columns, (size[0] * columns, size[1] * rows), same_y=same_y)
    for axes in grid[len(panels) :]:
        axes.remove()
    grid = grid[: len(panels)]
    colors = colormaps["tab10"].colors
    every = sorted({series.label for panel in panels.values() for series in panel})
    for axes, (title, panel) in zip(grid, panels.items(), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=integer))
        axes.margins(0.12 if any(series.texts for series in panel) else 0.05)
        for series in panel:
            place = every.index(series.label)
            _draw(axes, series, colors[place % len(colors)], MARKERS[place % len(MARKERS)])
        if front and all(front):
            points = sorted({(_mean(a), b.mean) for series in panel for a, b in series.points})
            points = [point for point in points if all(map(math.isfinite, point))]
            best = [*itertools.compress(points, pareto(points, front))]
            axes.plot(*zip(*best, strict=True), color="0.7", linewidth=6, alpha=0.5, zorder=0)
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
            (_mean(x), y.mean, text, colors[every.index(series.label) % len(colors)])
            for series in panel
            for (x, y), text in zip(series.points, series.texts, strict=bool(series.texts))
        ]
        place_labels(axes, labels)  # last, when everything has its size
    return _png(figure)


def _draw(axes: Any, series: Series, color: Any, marker: str) -> None:
    """One line with its intervals. An infinite PSNR cannot be drawn."""
    sides = [*zip(*series.points, strict=True)]
    means = [
        [one if math.isfinite(one) else math.nan for one in map(_mean, side)] for side in sides
    ]
    look = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.4}
    axes.plot(*means, label=series.label, **look)
    bars = ([*zip(*map(_bars, side), strict=True)] for side in sides)  # below, above
    xerr, yerr = (both if any(map(any, both)) else None for both in bars)
    if xerr or yerr:
        axes.errorbar(*means, xerr=xerr, yerr=yerr, fmt="none", color=color, alpha=0.4, capsize=3)


def _draw_identity(grid: Sequence[Any], value: float) -> None:
    """A dashed line where it is near the curves; far away it would flatten them."""
    low, high = grid[0].get_ylim()  # the panels share it
    near = low - (high - low) < value < high + (high - low)
    label = f"identity, {value:.4g}{'' if near else ' (outside)'}"
    for axes in grid:
        shown = axes.axhline(value) if near else axes.plot([], [])[0]
        shown.set(color="0.4", linestyle="--", linewidth=1.2, label=label)


def place_labels(axes: Any, labels: Sequence[tuple[float, float, str, Any]]) -> None:
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
