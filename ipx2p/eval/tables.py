"""Lines and records as tables: for the page, in Markdown, CSV and LaTeX (layer 4).

Lines are listed by task and network evaluations, so that those of equal cost stand together; rows
that cost none come first, identity, which every edit must beat, at the top.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

from ipx2p.eval.intervals import Difference, Estimate
from ipx2p.eval.lines import ALL, EFFECTIVE, SCALES, Line, has_choice, rounded
from ipx2p.eval.records import MADE, Record
from ipx2p.eval.scores import METRICS
from ipx2p.files import csv_text

SETTINGS = (
    "guidance",
    *SCALES,
    *EFFECTIVE,
    "fidelity",
    "window",
    "sampler",
    "spacing",
    "num_steps",
)
# Column -> heading with unit, and digits behind the point (None: as it is).
COLUMNS: dict[str, tuple[str, int | None]] = {
    **{
        name: (name.replace("_", " "), None)
        for name in ("task", "model", *MADE.values(), *SETTINGS)
    },
    "num_steps": ("steps", None),
    "pictures": ("pictures", None),
    "edits": ("edits", None),
    "failed": ("not finite, edits", None),
    "evaluations": ("network evaluations per edit", None),
    "seconds": ("seconds per edit", 3),
    "shared": ("shared with", None),
    "best": ("best scales by", None),
    **{name: (metric.label, metric.digits) for name, metric in METRICS.items()},
}
ABOUT = (
    "Means over pictures and seeds with 95 % intervals; seconds are medians. identity is the "
    "source, unchanged; oracle the target; vae the target through the autoencoder, a ceiling "
    "for edits; classical a method without learning."
)
EXPLAINED = {
    "guidance_scale": "A scale that a scheme does not use is empty.",
    "effective_guidance_scale": "Effective scales: those at which ip2p is exactly the same; empty "
    "if there are none. Curves are drawn at them; pictures are labelled with the scales that were "
    "set.",
    "evaluations": "An evaluation of the network's shallow part (deepcache) counts as its share of "
    "the FLOPs.",
    "failed": "Edits that are not finite are in no mean.",
    "shared": "Shared with: these edits are the same computation as those of that row, and were "
    "made once.",
    "best": "Best scales by: the metrics by which these are the best scales of the scheme with "
    "that number of steps.",
}
PAIRED = (
    "Each row minus {}, on the same pictures, with its 95 % interval, and cases won / tied / lost."
    " Green: better, and the interval excludes 0; red: worse."
)
ENDS = ("low", "high")
TALLY = ("wins", "ties", "losses")
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
LATEX |= {"[": "{[}", "*": "{*}"}  # these would belong to the end of the line above


class Cell(NamedTuple):
    """One cell of a table: its text, a number or word to sort by, and what it says in colour.

    beside: smaller, behind the text. verdict: "better", "worse" or "".
    """

    text: str
    value: float | str = ""
    beside: str = ""
    verdict: str = ""


class Table(NamedTuple):
    """A table: title, what it says in words, headings, rows, and the rows that are set off."""

    title: str
    about: Sequence[str]
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: Sequence[int] = ()
    is_open: bool = True


def values_of(line: Line) -> dict[str, Any]:
    """The line by column; None where it has no value, an `Estimate` for a metric."""
    cells = {"task": line.task or "all", "model": line.model}
    for name, one in zip(MADE.values(), line.made, strict=True):
        cells[name] = (one[:6] if "weights" in name else one) or None
    cells |= {"pictures": line.pictures, "edits": line.edits, "failed": line.failed}
    if math.isfinite(line.evaluations):
        cells |= {"evaluations": line.evaluations, "seconds": line.seconds}
    cells |= {"shared": line.shared, "best": ", ".join(line.best) or None}
    cells |= (line.settings or {}) | line.scores
    return {name: cells.get(name) for name in COLUMNS}


def common_settings(lines: Sequence[Line]) -> dict[str, Any]:
    """Settings that all edits have in common: for the head of a report, not for its table."""
    edited = [line.settings for line in lines if line.settings]
    values = {name: {settings.get(name) for settings in edited} for name in SETTINGS}
    same = {name: next(iter(found)) for name, found in values.items() if len(found) == 1}
    return {name: value for name, value in same.items() if value is not None}


def columns_of(lines: Sequence[Line]) -> list[str]:
    """Columns that say something: nothing that is everywhere the same, or as it was set."""
    edited = [line for line in lines if line.settings is not None]
    idle = {
        "task": True,  # the title of a table
        **{
            name: len({(line.model, line.made[i]) for line in lines})
            == len({line.model for line in lines})
            for i, name in enumerate(MADE.values())
        },
        "failed": not any(line.failed for line in lines),
        "pictures": all(line.pictures == line.edits for line in lines),
        "best": not has_choice(lines),
        **dict.fromkeys(common_settings(lines), True),
    }
    if all(line.effective in (None, line.scales) for line in edited):
        idle |= dict.fromkeys(EFFECTIVE, True)
    cells = [values_of(line) for line in lines]
    return [n for n in COLUMNS if not idle.get(n) and any(cell[n] is not None for cell in cells)]


def cell(name: str, value: Any) -> Cell:
    """A cell of a column; an estimate with its interval, a difference with cases won and lost.

    A metric that is not defined is a dash.
    """
    if value is None:
        return Cell("-" if name in METRICS else "")
    digits = COLUMNS[name][1]

    def number(value: float, sign: str = "") -> str:
        return f"{value:g}" if digits is None else rounded(value, digits, sign)

    if not isinstance(value, Estimate):
        return Cell(number(value) if isinstance(value, float) else str(value), value)
    sign = "+" if isinstance(value, Difference) else ""
    has_interval = value.low is not None
    beside = [f"[{number(value.low, sign)}, {number(value.high, sign)}]"] if has_interval else []
    verdict, better = "", METRICS[name].better
    if isinstance(value, Difference) and better:
        beside.append(" / ".join(str(getattr(value, count)) for count in TALLY))
        if has_interval:
            sign_of_all = (value.low > 0) - (value.high < 0)
            verdict = {1: "better", -1: "worse"}.get(sign_of_all * better, "")
    return Cell(number(value.mean, sign), value.mean, "\u2003".join(beside), verdict)


def tables_of(lines: Sequence[Line]) -> Iterator[Table]:
    """For each task the lines, then the differences from each reference."""
    columns = columns_of(lines)
    about = [
        ABOUT,
        " ".join(f"{METRICS[n].label}: {METRICS[n].about}." for n in columns if n in METRICS),
        " ".join(text for name, text in EXPLAINED.items() if name in columns),
    ]
    for task, group in itertools.groupby(lines, key=lambda line: line.task):
        mine, title = [*group], task or "All pictures"
        rows = [[cell(n, values[n]) for n in columns] for values in map(values_of, mine)]
        marked = [number for number, line in enumerate(mine) if line.is_built_in]
        heads = [COLUMNS[name][0] for name in columns]
        yield Table(title, about if task == ALL else [], heads, rows, marked)
        references = [*dict.fromkeys(name for line in mine for name in line.against)]
        for reference in references:
            compared = [line for line in mine if line.against.get(reference)]
            heads, rows = _by_label(compared, [line.against[reference] for line in compared])
            yield Table(
                f"{title}: differences from {reference}",
                [PAIRED.format(reference)],
                heads,
                rows,
                is_open=reference == references[0],
            )


def match_change(lines: Sequence[Line]) -> tuple[float, list[Line], list[Line]]:
    """Schemes where they change the picture equally, and at equal scales.

    The common change is the median over those lines whose change all schemes can reach, between
    their least and their most. Common scales are those that all schemes were run at; of several,
    those whose changes are nearest to the common one.

    Returns: the change, a line of each scheme at it, and at the common scales (none if there are no
        such scales); nothing if there are fewer than two schemes, or no common change.
    """
    schemes: dict[tuple, list[Line]] = {}
    for line in lines:
        if line.settings is not None and line.task == ALL and "change" in line.scores:
            schemes.setdefault(line.scheme, []).append(line)
    groups = [*schemes.values()]
    changes = [[line.means["change"] for line in group] for group in groups]
    least, most = max(map(min, changes), default=0), min(map(max, changes), default=0)
    if len(groups) < 2 or least > most:
        return math.nan, [], []
    common = median(one for some in changes for one in some if least <= one <= most)

    def distance(line: Line) -> float:
        return abs(line.means["change"] - common)

    def nearest(group: Sequence[Line], scales: tuple) -> Line | None:
        """Of the lines at these scales, or at those of them that the scheme uses."""
        there = [
            line
            for line in group
            if all(mine in (None, one) for mine, one in zip(line.scales, scales, strict=True))
        ]
        return min(there, key=distance, default=None)

    every = {line.scales for group in groups for line in group if None not in line.scales}
    at_scales = [[nearest(group, scales) for group in groups] for scales in sorted(every)]
    at_scales = [some for some in at_scales if None not in some]
    best = min(at_scales, key=lambda some: sum(map(distance, some)), default=[])
    return common, [min(group, key=distance) for group in groups], best


def tables_of_match(lines: Sequence[Line]) -> Iterator[Table]:
    """Schemes at equal measured change, and beside them at equal scales."""
    change, at_change, at_scales = match_change(lines)
    about = "Each scheme once: at equal scales it may be stronger just because it changes more."
    for how, mine in (
        (f"equal change, {cell('change', change).text} %", at_change),
        ("equal scales", at_scales),
    ):
        if mine:
            heads, rows = _by_label(mine, [line.scores for line in mine])
            yield Table(f"Schemes at {how}", [about], heads, rows)


def _by_label(
    lines: Sequence[Line], values: Sequence[dict[str, Estimate]]
) -> tuple[list[str], list[list[Cell]]]:
    """Heads and rows of what lines have of the metrics."""
    names = [name for name in METRICS if any(name in mine for mine in values)]
    rows = [
        [Cell(line.label, line.label), *(cell(name, mine.get(name)) for name in names)]
        for line, mine in zip(lines, values, strict=True)
    ]
    return ["model", *(COLUMNS[name][0] for name in names)], rows


def markdown(table: Table) -> str:
    """The table with its title and words."""
    rows = [table.heads, ["---"] * len(table.heads)]
    rows += [[f"{cell.text} {cell.beside}" for cell in row] for row in table.rows]
    text = "\n".join(f"| {' | '.join(map(escaped, row))} |" for row in rows)
    parts = [f"### {escaped(table.title)}", *map(escaped, table.about), text]
    return "\n\n".join(filter(None, parts))


def escaped(text: str) -> str:
    """Text as it is, in one line of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def latex(lines: Sequence[Line]) -> str:
    """A table of the package booktabs for each task: means, and their intervals in small type."""
    names = [name for name in METRICS if any(name in line.scores for line in lines)]
    heads = ["", "evaluations", *(COLUMNS[name][0] for name in names)]
    parts = ["% needs \\usepackage{booktabs}"]
    for task, mine in itertools.groupby(lines, key=lambda line: line.task):
        if task != ALL:
            parts.append(f"% {' '.join(task.split())}")
        parts += [f"\\begin{{tabular}}{{l{'r' * (len(names) + 1)}}}", "\\toprule"]
        parts.append(" & ".join(map(latex_text, heads)) + r" \\")
        for cost, group in itertools.groupby(mine, key=lambda line: line.evaluations):
            parts.append("\\midrule")
            for line in group:
                cells = [_latex(name, line.scores.get(name)) for name in names]
                about = [latex_text(line.label), f"{cost:g}" if math.isfinite(cost) else "--"]
                parts.append(" & ".join([*about, *cells]) + r" \\")
        parts += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(parts)


def latex_text(text: str) -> str:
    """Text as it is, in one line of LaTeX."""
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def _latex(name: str, score: Estimate | None) -> str:
    if score is None:
        return "--"
    shown = cell(name, score)
    mean = r"$\infty$" if score.mean == math.inf else shown.text
    return f"{mean} {{\\scriptsize {shown.beside}}}" if shown.beside else mean


def csv_of_lines(lines: Sequence[Line]) -> str:
    """The table for programs: all digits, the names of the columns as in the code."""
    there = [name for name in METRICS if any(name in line.scores for line in lines)]
    references = dict.fromkeys(name for line in lines for name in line.against)
    columns = [name for name in COLUMNS if name not in METRICS]
    columns[1:1] = ["label"]
    columns += [name + end for name in there for end in ("", *(f"_{end}" for end in ENDS))]
    for reference, name in itertools.product(references, there):
        one = f"{name}_minus_{reference}"
        columns += [one, *(f"{one}_{part}" for part in (*ENDS, *TALLY))]

    def cells(line: Line) -> dict[str, Any]:
        row = values_of(line) | {"label": line.label, "remarks": "; ".join(line.remarks) or None}
        for name, score in line.scores.items():
            row |= {name: score.mean} | {f"{name}_{end}": getattr(score, end) for end in ENDS}
        for reference, metrics in line.against.items():
            for name, one in metrics.items():
                row[f"{name}_minus_{reference}"] = one.mean
                for part in (*ENDS, *TALLY):
                    row[f"{name}_minus_{reference}_{part}"] = getattr(one, part)
        return row

    return csv_text([*columns, "remarks"], map(cells, lines))


def csv_of_edits(records: Sequence[Record]) -> str:
    """One line for each record: its case, settings, cost and scores."""
    rows = []
    for record in sorted(records, key=lambda record: (record.case["name"], record.row, record.key)):
        about = {"key": record.key, "model": record.model, "seed": record.seed}
        names = ("evaluations", "seconds", "failed")
        cost = {name: getattr(record, name) for name in names}
        rows.append(
            {**about, **record.case, **(record.settings or {}), **(record.picture or {}), **cost}
            | {**record.made_with, **record.computed_on, **record.scores}
        )
    return csv_text([*dict.fromkeys(name for row in rows for name in row)], rows)
