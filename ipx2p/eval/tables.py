"""Lines and records as tables: Markdown, CSV, LaTeX (layer 4).

Lines are listed by task and network evaluations, so that those of equal cost stand together; rows
that cost none come first, identity, which every edit must beat, at the top.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ipx2p.eval.fronts import Matched
from ipx2p.eval.intervals import LEAST, Difference, Estimate
from ipx2p.eval.lines import ALL, EFFECTIVE, SCALES, Line, has_choice
from ipx2p.eval.records import Record
from ipx2p.eval.scores import METRICS
from ipx2p.files import csv_text

SETTINGS = ("guidance", *SCALES, *EFFECTIVE, "sampler", "spacing", "num_steps")
# Column -> heading with unit, and digits behind the point (None: as it is).
COLUMNS: dict[str, tuple[str, int | None]] = {
    **{name: (name.replace("_", " "), None) for name in ("task", "model", "weights", *SETTINGS)},
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
ENDS = ("low", "high")
TALLY = ("wins", "ties", "losses")
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
LATEX |= {"[": "{[}", "*": "{*}"}  # these would belong to the end of the line above


def cells_of(line: Line) -> dict[str, Any]:
    """The line by column; None where it has no value, an `Estimate` for a metric."""
    cells = {"task": line.task or "all", "model": line.model, "weights": line.weights[:6] or None}
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
    digests = {(line.model, line.weights) for line in edited}
    idle = {
        "task": len({line.task for line in lines}) == 1,
        "weights": len(digests) == len({model for model, _ in digests}),
        "failed": not any(line.failed for line in lines),
        "pictures": all(line.pictures == line.edits for line in lines),
        "best": not has_choice(lines),
        **dict.fromkeys(common_settings(lines), True),
    }
    if all(line.effective in (None, (*line.scales.values(),)) for line in edited):
        idle |= dict.fromkeys(EFFECTIVE, True)
    cells = [cells_of(line) for line in lines]
    return [n for n in COLUMNS if not idle.get(n) and any(cell[n] is not None for cell in cells)]


def shown_value(name: str, value: Any) -> str:
    """One cell for people; of an estimate the mean, see `shown_interval`."""
    if isinstance(value, Estimate):
        return _number(name, value, value.mean)
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return _number(name, None, value)


def shown_interval(name: str, value: Any) -> str:
    """The interval of a cell, as `[20.90, 21.80]`; empty where there is none."""
    if not isinstance(value, Estimate) or value.low is None:
        return ""
    return f"[{_number(name, value, value.low)}, {_number(name, value, value.high)}]"


def _number(name: str, kind: Estimate | None, value: float) -> str:
    """With the digits of its column; differences with their sign."""
    digits = COLUMNS[name][1]
    sign = "+" if isinstance(kind, Difference) else ""
    return f"{value:g}" if digits is None else f"{value:{sign}.{digits}f}"


def markdown(lines: Sequence[Line]) -> str:
    """One table for each task and number of network evaluations, and what it says in words."""
    columns = [name for name in columns_of(lines) if name not in ("task", "evaluations")]
    parts = []
    for title, group in groups_of(lines):
        rows = []
        for cells in map(cells_of, group):
            values = ((shown_value(n, cells[n]), shown_interval(n, cells[n])) for n in columns)
            rows.append([" ".join(filter(None, both)) for both in values])
        parts += [f"### {escaped(title)}", "", *_table([COLUMNS[n][0] for n in columns], rows), ""]
        if said := [f"- {line.label}: {remark}." for line in group for remark in line.remarks]:
            parts += [*map(escaped, said), ""]
    return "\n".join(parts)


def markdown_of_differences(lines: Sequence[Line]) -> str:
    """The paired differences, a table for each task and reference."""
    several = len({line.task for line in lines}) > 1
    parts = []
    for task, reference, metrics, group in differences_of(lines):
        prefix = f"{task or 'all'}: " if several else ""
        rows = []
        for line in group:
            cells = (line.against[reference].get(name) for name in metrics)
            rows.append([line.label, *map(_told, metrics, cells)])
        heads = ["", *(COLUMNS[name][0] for name in metrics)]
        title = escaped(f"{prefix}differences from {reference}")
        parts += [f"### {title}", "", *_table(heads, rows), ""]
    told = "A line minus the reference, its 95 % interval, and cases won / tied / lost."
    return "\n".join([told, "", *parts]) if parts else ""


def differences_of(
    lines: Sequence[Line],
) -> Iterator[tuple[str, str, list[str], list[Line]]]:
    """Task, reference, metrics, and the lines that are compared with it."""
    for task, group in itertools.groupby(lines, key=lambda line: line.task):
        mine = [*group]
        for reference in dict.fromkeys(name for line in mine for name in line.against):
            compared = [line for line in mine if line.against.get(reference)]
            there = {name for line in compared for name in line.against[reference]}
            yield task, reference, [name for name in METRICS if name in there], compared


def _told(name: str, one: Difference | None) -> str:
    """A difference with its interval, and cases won, tied and lost."""
    if one is None:
        return ""
    tally = " / ".join(str(getattr(one, count)) for count in TALLY) if METRICS[name].better else ""
    return " ".join(filter(None, [shown_value(name, one), shown_interval(name, one), tally]))


def markdown_of_match(change: float, schemes: Sequence[Matched]) -> str:
    """Schemes at equal change beside them at equal scales, see `match_change`."""
    names = [name for name in METRICS if any(name in one.at_change.scores for one in schemes)]
    heads = ["", *(COLUMNS[name][0] for name in names)]
    parts = []
    for title, group in (
        (f"at equal change, {shown_value('change', change)} %", [m.at_change for m in schemes]),
        ("at equal scales", [m.at_scales for m in schemes if m.at_scales]),
    ):
        rows = [
            [line.label, *(shown_value(name, line.scores.get(name)) for name in names)]
            for line in group
        ]
        parts += [f"### {title}", "", *_table(heads, rows), ""] if rows else []
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, *rows]
    head, *rest = (f"| {' | '.join(map(escaped, cells))} |" for cells in lines)
    return [head, "|" + "---|" * len(heads), *rest]


def escaped(text: str) -> str:
    """Text as it is, in one line of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def groups_of(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Lines of one task and cost, with a title."""
    several = len({line.task for line in lines}) > 1
    for (task, cost), group in itertools.groupby(lines, key=lambda ln: (ln.task, ln.evaluations)):
        title = f"{cost:g} network evaluations per edit" if cost else "without an edit model"
        prefix = f"{task or 'all'}: " if several else ""
        yield prefix + (title if math.isfinite(cost) else "no finite edit"), [*group]


def latex(lines: Sequence[Line]) -> str:
    """A table of the package booktabs for each task: means, and their intervals in small type."""
    names = [name for name in METRICS if any(name in line.scores for line in lines)]
    heads = ["", "evaluations", *(COLUMNS[name][0] for name in names)]
    parts = ["% needs \\usepackage{booktabs}"]
    for task, mine in itertools.groupby(lines, key=lambda line: line.task):
        if task != ALL:
            parts.append(f"% {' '.join(task.split())}")
        parts += [f"\\begin{{tabular}}{{l{'r' * (len(names) + 1)}}}", "\\toprule", _row_of(heads)]
        for _, group in groups_of([*mine]):
            parts.append("\\midrule")
            for line in group:
                cells = [_latex(name, line.scores.get(name)) for name in names]
                cost = f"{line.evaluations:g}" if math.isfinite(line.evaluations) else "--"
                parts.append(" & ".join([latex_text(line.label), cost, *cells]) + r" \\")
        parts += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(parts)


def latex_text(text: str) -> str:
    """Text as it is, in one line of LaTeX."""
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def _row_of(heads: Sequence[str]) -> str:
    return " & ".join(map(latex_text, heads)) + r" \\"


def _latex(name: str, score: Estimate | None) -> str:
    if score is None:
        return "--"
    mean = r"$\infty$" if score.mean == math.inf else shown_value(name, score)
    interval = shown_interval(name, score)
    return f"{mean} {{\\scriptsize {interval}}}" if interval else mean


def csv_of_lines(lines: Sequence[Line]) -> str:
    """The table for programs: all digits, the names of the columns as in the code."""
    there = [name for name in METRICS if any(name in line.scores for line in lines)]
    references = dict.fromkeys(name for line in lines for name in line.against)

    def cells(line: Line) -> dict[str, Any]:
        row = cells_of(line) | {"label": line.label, "remarks": "; ".join(line.remarks) or None}
        for name, score in line.scores.items():
            row |= {name: score.mean} | {f"{name}_{end}": getattr(score, end) for end in ENDS}
        for reference, metrics in line.against.items():
            for name, one in metrics.items():
                row[f"{name}_minus_{reference}"] = one.mean
                for part in (*ENDS, *TALLY):
                    row[f"{name}_minus_{reference}_{part}"] = getattr(one, part)
        return row

    columns = [name for name in COLUMNS if name not in METRICS]
    columns[1:1] = ["label"]
    columns += [name + end for name in there for end in ("", *(f"_{end}" for end in ENDS))]
    for reference, name in itertools.product(references, there):
        one = f"{name}_minus_{reference}"
        columns += [one, *(f"{one}_{part}" for part in (*ENDS, *TALLY))]
    return csv_text([*columns, "remarks"], map(cells, lines))


def csv_of_edits(records: Sequence[Record]) -> str:
    """One line for each record: its case, settings, cost and scores."""

    def cells(record: Record) -> dict[str, Any]:
        about = {"key": record.key, "model": record.model, "seed": record.seed}
        cost = {"evaluations": record.evaluations, "seconds": record.seconds}
        parts = (
            record.case,
            record.settings or {},
            record.picture or {},
            cost,
            {"failed": record.failed},
        )
        parts += (record.made_with, record.computed_on, record.scores)
        for part in parts:
            about |= part
        return about

    rows = [*map(cells, records)]
    return csv_text([*dict.fromkeys(name for row in rows for name in row)], rows)


def computed_on(records: Sequence[Record]) -> str:
    """How and on what device the edits were computed, since their seconds depend on it."""
    ways: dict[str, None] = {}
    for record in records:
        if record.computed_on and record.settings:
            how = record.computed_on
            place = how["device"].partition(":")[0]
            threads = f", {how['threads']} threads" if place == "cpu" else ""
            compiled = ", compiled" if how["compiled"] else ""
            branches = "" if how["batch_branches"] else ", one branch at a time"
            ways[
                f"{place} ({how['device_name']}{threads}), {how['dtype']}{compiled}, in batches of "
                f"{how['batch_size']}{branches}"
            ] = None
    several = " (seconds of different ones do not compare)" if len(ways) > 1 else ""
    return "; ".join(ways) + several


def notes_of(records: Sequence[Record], lines: Sequence[Line]) -> list[str]:
    """What a reader of the numbers must know."""
    notes = []
    if few := [line for line in lines if line.scores and line.pictures < LEAST]:
        which = "" if len(few) == len(lines) else " where there are so few"
        notes.append(f"No intervals{which}: they need {LEAST} pictures or more.")
    if has_choice(lines):
        choosing = {record.case["name"] for record in records if record.selects}
        notes.append(
            f"Best scales were chosen on {len(choosing)} other cases, and are reported on these."
            if choosing
            else "Best scales, in the table and in the curves against network evaluations, were "
            "chosen on the reported pictures themselves, which flatters them: choose on others "
            "with --select-on."
        )
    return notes
