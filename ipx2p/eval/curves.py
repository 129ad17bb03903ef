"""Curves of a sweep, by matplotlib (the extra `plots`) (layer 4).

The trade-off is Fig. 8 of InstructPix2Pix (arXiv:2211.09800): how much of the picture is kept,
against how far the change goes where the captions go. Lines with an effective scale stand at it;
schemes that do not use a scale stand at all of its values.
"""

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ipx2p.eval.scores import METRICS
from ipx2p.eval.sweep import SCALES
from ipx2p.eval.tables import ALL, TRADE_OFF, Line

MARKERS = "osD^v<>P*Xh"  # one more than colours, so that both repeat together only after 110
# One for each sampler, as matplotlib writes them: an offset, then lengths of ink and gap
DASHES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 3)))
# Where a label may stand, in points from its own: near it, else farther away.
OFFSETS = [(6, 4), (6, -11), (-6, 4), (-6, -11), (0, 8), (0, -15), (9, -4), (-9, -4)]
OFFSETS += [(2 * x, 2 * y) for x, y in OFFSETS]
PANEL = (5.0, 4.2)  # inches
LARGE_PANEL = (7.5, 6.0)
HOW_TO_GET = 'matplotlib is not installed: pip install -e ".[plots]", and run it again for curves'


Label = tuple[float, float, str, Any]  # x, y, text, colour


class Curve(NamedTuple):
    """One figure: a name for its file, what it shows, and the PNG."""

    name: str
    caption: str
    png: bytes


def has_matplotlib() -> bool:
    """Whether curves can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def make_curves(lines: Sequence[Line]) -> list[Curve]:
    """All curves that these lines of the table allow, of all tasks together."""
    lines = [line for line in lines if line.task == ALL]
    guided = [line for line in lines if line.settings is not None and line.means]
    identity = next(line for line in lines if line.settings is None).means
    against_targets = [metric for metric in ("psnr", "ssim") if metric in identity]
    hows = dict.fromkeys((line.settings.sampler, line.settings.num_steps) for line in guided)
    curves = []
    for sampler, steps in hows:
        mine = [
            ln for ln in guided if (ln.settings.sampler, ln.settings.num_steps) == (sampler, steps)
        ]
        how = f"{sampler}, {steps} steps"
        both = [line for line in mine if line.trade_off]
        if "clip_direction" in identity and both:
            curves.append(_trade_off(_at_all_values(both), how))
        if len({_scales(line) for line in mine}) > 1:
            for metric in [m for m in against_targets or ["change"] if m in identity]:
                there = _at_all_values([line for line in mine if metric in line.means])
                if there:
                    curves.append(_against_scale(there, metric, identity, how))
    for metric in against_targets:
        if there := [line for line in guided if metric in line.means]:
            curves.append(_against_evaluations(there, metric, identity))
    return curves


def _at_all_values(lines: Sequence[Line]) -> list[Line]:
    """Lines that do not use a scale, once for each value that others have."""
    spread = [*lines]
    for name in SCALES:
        values = sorted({line.scales[name] for line in lines} - {None})
        spread = [copy for line in spread for copy in _copies(line, name, values)]
    return spread


def _copies(line: Line, name: str, values: Sequence[float]) -> list[Line]:
    if line.scales[name] is not None or not values:
        return [line]
    return [replace(line, settings=replace(line.settings, **{name: value})) for value in values]


def _scales(line: Line) -> tuple[float, float]:
    return line.settings.guidance_scale, line.settings.image_guidance_scale


def _along(lines: Sequence[Line], *, first: int) -> tuple[int, int]:
    """Which of the two scales runs along the lines, and which one has a panel for each value."""
    values = [{_scales(line)[index] for line in lines} for index in (0, 1)]
    along = first if len(values[first]) > 1 else 1 - first
    return along, 1 - along


NAMES = ("guidance scale", "image guidance scale")


def _trade_off(lines: Sequence[Line], how: str) -> Curve:
    from matplotlib.ticker import MaxNLocator

    along, across = _along(lines, first=1)
    damped = any(_effective(line) != _scales(line) for line in lines)

    def draw(axes: Any, shown: Sequence[Line], style: Callable[[str], dict]) -> list[Label]:
        labels = []
        for scheme, group in _by_scheme(shown, along).items():
            group = group if _uses(group[0], along) else group[:1]
            xs, ys = ([line.trade_off[m] for line in group] for m in TRADE_OFF)
            axes.plot(xs, ys, label=scheme, **style(scheme))
            labels += [
                (x, y, f"{_effective(line)[along]:g}", style(scheme)["color"])
                for x, y, line in zip(xs, ys, group, strict=True)
                if _uses(line, along)
            ]
        axes.set_xlabel(METRICS["clip_direction"].label)
        axes.set_ylabel(METRICS["clip_image"].label)
        axes.xaxis.set_major_locator(MaxNLocator(6))  # tick labels with many digits need room
        axes.margins(0.12)
        return labels

    caption = (
        f"Trade-off at {how}: to the right more of the instruction is done, upwards more of the "
        f"picture is kept. Points are labelled by {'effective ' if damped else ''}{NAMES[along]}, "
        "where there is room."
    )
    png = _panels(lines, across, draw, size=LARGE_PANEL)
    return Curve(f"trade_off_{_file(how)}", caption, png)


def _against_scale(lines: Sequence[Line], metric: str, identity: dict, how: str) -> Curve:
    along, across = _along(lines, first=0)
    damped = any(_effective(line) != _scales(line) for line in lines)

    def draw(axes: Any, shown: Sequence[Line], style: Callable[[str], dict]) -> None:
        for scheme, group in _by_scheme(shown, along).items():
            points = [(_effective(line)[along], line.means[metric]) for line in group]
            axes.plot(*zip(*_finite(points), strict=True), label=scheme, **style(scheme))
        axes.set_xlabel(f"{NAMES[along]}{', effective' if damped else ''}")
        axes.set_ylabel(METRICS[metric].label)

    caption = f"{METRICS[metric].label} against {NAMES[along]}, at {how}: {METRICS[metric].about}."
    return Curve(
        f"{metric}_scale_{_file(how)}", caption, _panels(lines, across, draw, identity[metric])
    )


def _against_evaluations(lines: Sequence[Line], metric: str, identity: dict) -> Curve:
    from matplotlib.ticker import MaxNLocator

    best: dict[tuple[str, str, float], Line] = {}
    for line in lines:
        key = (line.settings.guidance, line.settings.sampler, line.evaluations)
        if key not in best or line.means[metric] > best[key].means[metric]:
            best[key] = line

    samplers = sorted({line.settings.sampler for line in lines})

    def draw(axes: Any, shown: Sequence[Line], style: Callable[[str], dict]) -> None:
        groups: dict[tuple[str, str], list[Line]] = {}
        for line in sorted(shown, key=lambda line: line.evaluations):
            groups.setdefault((line.settings.guidance, line.settings.sampler), []).append(line)
        for (scheme, sampler), group in groups.items():
            points = _finite([(line.evaluations, line.means[metric]) for line in group])
            look, label = style(scheme), scheme
            if len(samplers) > 1:
                look |= {"linestyle": DASHES[samplers.index(sampler)]}
                label = f"{scheme}, {sampler}"
            axes.plot(*zip(*points, strict=True), label=label, **look)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("network evaluations per edit")
        axes.set_ylabel(METRICS[metric].label)

    caption = (
        f"{METRICS[metric].label} against network evaluations, each scheme at the best of its "
        "scales; one line for each sampler."
    )
    return Curve(
        f"{metric}_evaluations", caption, _panels([*best.values()], None, draw, identity[metric])
    )


def _effective(line: Line) -> tuple[float, float]:
    """Both scales that it acts like; one that it does not use is the one asked for."""
    return tuple(
        asked if acting is None else acting
        for asked, acting in zip(_scales(line), line.effective.values(), strict=True)
    )


def _uses(line: Line, index: int) -> bool:
    return [*line.scales.values()][index] is not None


def _by_scheme(lines: Sequence[Line], along: int) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: _scales(line)[along]):
        groups.setdefault(line.settings.guidance, []).append(line)
    return groups


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without infinite PSNR, which nothing can draw; at least one point, so that zip has shape."""
    return [p for p in points if math.isfinite(p[1])] or [(points[0][0], math.nan)]


def _draw_identity(grid: Sequence[Any], value: float) -> None:
    """A dashed line where it is near the curves; far away it would press them flat."""
    low, high = grid[0].get_ylim()  # the panels share it
    near = low - (high - low) < value < high + (high - low)
    label = f"identity, {value:.4g}{'' if near else ' (outside)'}"
    for axes in grid:
        shown = axes.axhline(value) if near else axes.plot([], [])[0]
        shown.set(color="0.4", linestyle="--", linewidth=1.2, label=label)


def _styles(lines: Sequence[Line]) -> Callable[[str], dict[str, Any]]:
    """How the line of each scheme looks; the same in all figures of the same schemes."""
    from matplotlib import colormaps

    schemes = sorted({line.settings.guidance for line in lines})
    colors = colormaps["tab10"].colors

    def style(scheme: str) -> dict[str, Any]:
        place = schemes.index(scheme)
        return {
            "color": colors[place % len(colors)],
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 5,
            "linestyle": "-" if place < len(colors) else "-.",
            "linewidth": 1.4,
        }

    return style


def _panels(
    lines: Sequence[Line],
    across: int | None,
    draw: Callable[..., None],
    identity: float = math.nan,
    size: tuple[float, float] = PANEL,
) -> bytes:
    """One panel for each value of the other scale, one legend beside them all; a PNG.

    Args:
        draw: draws lines into axes in the style of each scheme; returns labels of points, if any.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = _styles(lines)
    values = [None] if across is None else sorted({_scales(line)[across] for line in lines})
    columns = min(3, len(values))
    rows = math.ceil(len(values) / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=110)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    labels = []
    for axes, value in zip(grid, values, strict=False):
        shown = [line for line in lines if value is None or _scales(line)[across] == value]
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        if value is not None:
            axes.set_title(f"{NAMES[across]} {value:g}", fontsize=10)
        labels.append(draw(axes, shown, style) or [])
    for axes in grid[len(values) :]:
        axes.remove()
    if math.isfinite(identity):
        _draw_identity(grid[: len(values)], identity)
    handles = {}
    for axes in grid[: len(values)]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # The legend gets room beside the panels, and what is higher than they are makes them higher.
    width = size[0] * columns + 0.075 * max(map(len, handles)) + 1.2
    figure.set_size_inches(width, max(size[1] * rows, 0.24 * len(handles) + 0.8))
    figure.legend([*handles.values()], [*handles], loc="outside right upper", fontsize=8)
    for axes, points in zip(grid, labels, strict=False):
        _place_labels(axes, points)  # now that everything has its size
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _place_labels(axes: Any, labels: Sequence[Label]) -> None:
    """Write each label beside its point, on the side where it covers least of what is there.

    One that would cover another label is left out.
    """
    from matplotlib.patheffects import withStroke

    if not labels:
        return
    figure = axes.figure
    figure.draw_without_rendering()  # so that data have places in pixels
    points = [axes.transData.transform((x, y)) for x, y, _, _ in labels]
    marks = [(px - 5, py - 5, px + 5, py + 5) for px, py in points]
    for line in axes.lines:
        for (ax, ay), (bx, by) in itertools.pairwise(axes.transData.transform(line.get_xydata())):
            for share in (i / 16 for i in range(1, 16)):
                x, y = ax + share * (bx - ax), ay + share * (by - ay)
                marks.append((x - 2, y - 2, x + 2, y + 2))
    written: list[tuple[float, ...]] = []
    per_point = figure.dpi / 72
    for (x, y, text, color), (px, py) in zip(labels, points, strict=True):
        width, height = 5.2 * per_point * len(text), 8 * per_point
        choices = []
        for place, (dx, dy) in enumerate(OFFSETS):
            left = px + dx * per_point - (width if dx < 0 else width / 2 if dx == 0 else 0)
            bottom = py + dy * per_point
            box = (left, bottom, left + width, bottom + height)
            over_labels, over_marks = (
                sum(_overlap(box, other) for other in others) for others in (written, marks)
            )
            choices.append((over_labels, over_marks, place, box))
        over_labels, _, place, box = min(choices)
        if over_labels:
            continue
        dx, dy = OFFSETS[place]
        axes.annotate(
            text,
            (x, y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="right" if dx < 0 else "center" if dx == 0 else "left",
            fontsize=8,
            color=color,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
        written.append(box)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return max(wide, 0.0) * max(high, 0.0)


def _file(how: str) -> str:
    return how.replace(", ", "_").replace(" ", "_")
