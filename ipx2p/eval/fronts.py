"""Lines beside each other on equal terms: Pareto fronts, and schemes at equal change (layer 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ipx2p.eval.lines import ALL, Line, sortable


@dataclass(frozen=True)
class Matched:
    """One scheme: its line at the common change, and at the common scales (None: it has none)."""

    at_change: Line
    at_scales: Line | None


def match_change(lines: Sequence[Line]) -> tuple[float, list[Matched]]:
    """Schemes where they change the picture equally, beside them at equal scales.

    The common change is the median over those lines whose change all schemes can reach, between
    their least and their most. Common scales are those that all schemes were run at; of several,
    those whose changes are nearest to the common one.

    Returns: the change, and the schemes; none if there are fewer than two, or no common change.
    """
    schemes: dict[tuple, list[Line]] = {}
    for line in lines:
        if line.settings is not None and line.task == ALL and "change" in line.scores:
            schemes.setdefault(line.scheme[:-1], []).append(line)
    changes = [[line.means["change"] for line in group] for group in schemes.values()]
    if len(schemes) < 2:
        return math.nan, []
    least, most = max(map(min, changes)), min(map(max, changes))
    if least > most:
        return math.nan, []
    reachable = [one for some in changes for one in some if least <= one <= most]
    common = median(reachable)

    def distance(line: Line) -> float:
        return abs(line.means["change"] - common)

    def at(group: Sequence[Line], scales: tuple) -> list[Line]:
        """Lines at these scales, or at those of them that the scheme uses."""
        return [
            line
            for line in group
            if all(
                mine in (None, one) for mine, one in zip(line.scales.values(), scales, strict=True)
            )
        ]

    every = {(*line.scales.values(),) for group in schemes.values() for line in group}
    shared = [
        scales
        for scales in sorted(every, key=lambda scales: [*map(sortable, scales)])
        if None not in scales and all(at(group, scales) for group in schemes.values())
    ]
    scales = min(
        shared,
        key=lambda scales: sum(min(map(distance, at(group, scales))) for group in schemes.values()),
        default=None,
    )
    return common, [
        Matched(
            min(group, key=distance),
            None if scales is None else min(at(group, scales), key=distance),
        )
        for group in schemes.values()
    ]


def pareto(points: Sequence[Sequence[float]], higher: Sequence[bool]) -> list[bool]:
    """Which points no other one is better than in one coordinate, and as good in all.

    Args:
        higher: whether high is better, for each coordinate.
    """
    signs = [1 if is_better else -1 for is_better in higher]
    values = [[sign * x for sign, x in zip(signs, point, strict=True)] for point in points]

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        return one != other and all(a >= b for a, b in zip(one, other, strict=True))

    return [
        not any(map(math.isnan, one)) and not any(dominates(other, one) for other in values)
        for one in values
    ]
