"""The report of records: tables, pictures, curves, and the page of them all (layer 4).

OUTPUT/  index.html  table.md  table.csv  table.tex  edits.csv  chosen_on.csv  grids/  curves/

It is made from records and their pictures alone: no weights, no manifest, no photographs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipx2p.eval.benchmarks.judged import mean_over_tasks
from ipx2p.eval.benchmarks.registry import PROTOCOLS
from ipx2p.eval.curves import HOW_TO_GET, has_matplotlib, make_curves
from ipx2p.eval.fronts import match_change
from ipx2p.eval.grids import by_case, draw_cases, make_grids, make_rows, row_of
from ipx2p.eval.intervals import Difference, Estimate
from ipx2p.eval.lines import ALL, EFFECTIVE, Line, has_choice, make_lines
from ipx2p.eval.page import Cell, Shown, Table, make_page
from ipx2p.eval.records import Record
from ipx2p.eval.scores import METRICS
from ipx2p.eval.tables import (
    COLUMNS,
    cells_of,
    columns_of,
    common_settings,
    computed_on,
    csv_of_edits,
    csv_of_lines,
    escaped,
    latex,
    markdown,
    markdown_of_differences,
    markdown_of_match,
    notes_of,
    shown_interval,
    shown_value,
)
from ipx2p.files import atomic_write
from ipx2p.images import save_image

TITLE = "Edits compared"
GRIDS = 4  # pictures that are shown
MAX_TOLD = 3  # instructions in the head
EXPLAINED = {
    "guidance_scale": "A scale that a scheme does not use is empty.",
    "effective_guidance_scale": "Effective scales: those at which ip2p is exactly the same; empty "
    "if there are none. Curves are drawn at them; pictures are labelled with the scales that were "
    "set.",
    "failed": "Edits that are not finite are in no mean.",
    "shared": "Shared with: these edits are the same computation as those of that line, and were "
    "made once.",
    "best": "Best scales by: the metrics by which these are the best scales of the scheme at this "
    "cost.",
}


def write_report(
    output: Path,
    records: Sequence[Record],
    baseline: str | None = None,
    grids: int = GRIDS,
    *,
    about: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write the report, and remove the grids and curves of an earlier one.

    Args:
        baseline: label or model of a line that the others are compared with, besides identity.
        grids: how many pictures are shown. about: more for the head, by name. notes: what is
            missing, and how to get it.
    Returns: the table and the page.
    Raises: InputError for records that do not compare, or a picture that is gone.
    """
    lines = make_lines(records, baseline)
    reported = [record for record in records if not record.selects]
    about = {**(about or {}), **about_of(reported, lines)}
    notes = [*notes, *notes_of(records, lines), *_notes(reported)]
    published = [*_published(reported, lines)]
    texts = _texts(reported, lines, about, notes)
    texts["table.md"] += "".join(map(_markdown, published))
    (output / "chosen_on.csv").unlink(missing_ok=True)
    if choosing := [replace(record, selects=False) for record in records if record.selects]:
        texts["chosen_on.csv"] = csv_of_lines(make_lines(choosing))
    for name, text in texts.items():
        _write(output / name, text)
    for folder in ("grids", "curves"):
        for path in filter(Path.is_file, (output / folder).glob("*")):
            path.unlink()
    curves = make_curves(lines) if has_matplotlib() else []
    for curve in curves:
        _write(output / "curves" / f"{curve.name}.png", curve.png)
    remarks, lesser = remarks_of(lines)
    tables = [_table_of(lines), *_differences(lines), *published]
    shown = [*_shown(reported, lines, grids, output / "grids")]
    page = make_page(
        TITLE,
        about=about,
        notes=notes,
        remarks=remarks,
        lesser=lesser,
        tables=tables,
        curves=curves,
        shown=shown,
    )
    _write(output / "index.html", page)
    return [output / "table.md", output / "index.html"]


def _texts(
    records: Sequence[Record], lines: Sequence[Line], about: Mapping[str, str], notes: Sequence[str]
) -> dict[str, str]:
    """The tables, by name of the file."""
    parts = [
        f"# {TITLE}",
        "\n".join(f"- {name}: {escaped(value)}" for name, value in about.items()),
        *map(escaped, notes),
        markdown(lines),
        markdown_of_differences(lines),
        markdown_of_match(*match_change(lines)),
    ]
    return {
        "table.md": "\n\n".join(filter(None, parts)),
        "table.csv": csv_of_lines(lines),
        "table.tex": latex(lines),
        "edits.csv": csv_of_edits(records),
    }


def about_of(records: Sequence[Record], lines: Sequence[Line]) -> dict[str, str]:
    """What was compared, for the head of the report."""
    edits = [record for record in records if record.settings is not None]
    cases = [record.case for record in records]
    models = {}
    for record in edits:
        made = record.made_with
        known = (made.get("weights"), str(made.get("weights_digest", ""))[:8])
        models[f"{record.model}: {', '.join(filter(None, known))}"] = None
    sizes = [f"{p['width']} x {p['height']}" for p in (r.picture for r in records) if p]
    facts = {
        "models": "; ".join(models),
        "benchmark": _listed(case.get("benchmark") for case in cases),
        "pictures": f"{len({case['group'] for case in cases})} in {len(by_case(records))} cases, "
        f"{_listed(sizes, MAX_TOLD)} pixels",
        "tasks": _listed(case["task"] for case in cases),
        "instructions": _listed((case["instruction"] for case in cases), MAX_TOLD, "; "),
        **{
            name.replace("_", " "): _listed(record.made_with.get(name) for record in edits)
            for name in ("negative_instruction", "resolution", "dtype")
        },
        **{
            COLUMNS[name][0]: value if isinstance(value, str) else f"{value:g}"
            for name, value in common_settings(lines).items()
            if name not in EFFECTIVE
        },
        "seeds": _listed(record.seed for record in edits),
        "computed on": computed_on(records),
        "measured by": _measured_by(records),
        "versions": _listed(
            f"ipx2p {on['ipx2p']}, torch {on['torch']}, Python {on['python']}"
            for on in (record.computed_on for record in edits)
            if {"ipx2p", "torch", "python"} <= {*on}
        ),
        "records": _listed(sorted({str(record.folder) for record in records})),
    }
    return {name: value for name, value in facts.items() if value}


def _listed(values: Iterable[Any], most: int | None = None, between: str = ", ") -> str:
    """Each value once; after so many, how many more there are."""
    unlike = [str(value) for value in dict.fromkeys(values) if value not in (None, "")]
    told = between.join(unlike[:most])
    return told if len(unlike) == len(unlike[:most]) else f"{told} and {len(unlike) - most} more"


def _measured_by(records: Iterable[Record]) -> str:
    """The networks that measured, with the names of their metrics."""
    by_how: dict[str, dict[str, None]] = {}
    for record in records:
        for name, how in record.scored_by.items():
            if how:
                by_how.setdefault(how, {})[name] = None
    return "; ".join(f"{', '.join(names)}: {how}" for how, names in by_how.items())


def _notes(reported: Sequence[Record]) -> list[str]:
    """What is missing, or hardly compares."""
    notes = []
    for name in ("resolution", "dtype"):
        values = {r.made_with.get(name) for r in reported if r.settings is not None}
        if len(values) > 1:
            told = ", ".join(sorted(map(str, values)))
            notes.append(f"Edits were made at different {name} ({told}): they hardly compare.")
    if failed := sum(record.picture is None for record in reported):
        notes.append(f"{failed} of {len(reported)} edits are not finite, and are in no mean.")
    there = [record for record in reported if record.picture is not None]
    for name, metric in METRICS.items():
        count = sum(name in record.scores for record in there)
        if 0 < count < len(there):
            notes.append(
                f"{metric.label} of {count} of {len(there)} pictures: the others lack what it "
                "needs, or are too small."
            )
    if not has_matplotlib():
        notes.append(f"No curves: {HOW_TO_GET}.")
    return notes


def remarks_of(lines: Sequence[Line]) -> tuple[list[str], list[str]]:
    """What the numbers say, in words: of all lines, or first of those with the best scales."""
    is_choice = has_choice(lines) and any(line.best for line in lines)
    said: tuple[list[str], list[str]] = [], []
    for line in lines:
        if line.remarks:
            name = f"{line.task}, {line.label}" if line.task else line.label
            is_lesser = is_choice and line.settings is not None and not line.best
            said[is_lesser].append(f"{name}: {'; '.join(line.remarks)}.")
    return said


def _table_of(lines: Sequence[Line]) -> Table:
    """The table of all lines."""
    columns = columns_of(lines)
    rows = []
    for cells in map(cells_of, lines):
        rows.append([_cell(name, cells[name]) for name in columns])
    about = [
        "Means over pictures and seeds with 95 % intervals, of seconds the median. Click a "
        "heading to sort. identity is the source, unchanged; oracle the target; vae the target "
        "through the autoencoder, the best that any edit can be; classical a method without "
        "learning.",
        " ".join(
            f"{METRICS[name].label}: {METRICS[name].about}." for name in columns if name in METRICS
        ),
        " ".join(text for name, text in EXPLAINED.items() if name in columns),
    ]
    marked = [index for index, line in enumerate(lines) if line.is_built_in]
    return Table("Table", about, [COLUMNS[name][0] for name in columns], rows, marked)


def _cell(name: str, value: Any) -> Cell:
    """A number, a text, or an estimate with its interval."""
    raw = value.mean if isinstance(value, Estimate) else value
    return Cell(shown_value(name, value), "" if raw is None else raw, shown_interval(name, value))


def _differences(lines: Sequence[Line]) -> Iterator[Table]:
    """A table of paired differences for each reference."""
    tasks = len({line.task for line in lines}) > 1
    references = [*dict.fromkeys(name for line in lines for name in line.against)]
    for reference in references:
        mine = [line for line in lines if line.against.get(reference)]
        metrics = [n for n in METRICS if any(n in line.against[reference] for line in mine)]
        rows = []
        for line in mine:
            head = [Cell(line.task or "all")] * tasks + [Cell(line.label)]
            cells = (_difference(name, line.against[reference].get(name)) for name in metrics)
            rows.append([*head, *cells])
        about = (
            f"Each line minus {reference}, on the same pictures, with 95 % intervals; behind them "
            "pictures won / tied / lost. Green: better, and the interval excludes 0; red: worse."
        )
        heads = [*["task"] * tasks, "model", *(METRICS[name].label for name in metrics)]
        title = f"Paired differences from {reference}"
        yield Table(title, [about], heads, rows, is_open=reference == references[0])


def _difference(name: str, one: Difference | None) -> Cell:
    if one is None:
        return Cell("", "")
    metric, verdict = METRICS[name], ""
    if one.low is not None:
        sign = (one.low > 0) - (one.high < 0)
        verdict = {1: "better", -1: "worse"}.get(sign * metric.better, "")
    tally = f"\u2003{one.wins} / {one.ties} / {one.losses}" if metric.better else ""
    text = f"{one.mean:+.{metric.digits}f}"
    return Cell(text, one.mean, shown_interval(name, one) + tally, verdict)


def _published(records: Sequence[Record], lines: Sequence[Line]) -> Iterator[Table]:
    """For each published benchmark: our lines, and the rows that they may be compared with."""
    names = [*dict.fromkeys(record.case["benchmark"] for record in records)]
    for protocol in (PROTOCOLS[name] for name in names if name in PROTOCOLS):
        mine = [record for record in records if record.case["benchmark"] == protocol.name]
        ours = make_lines(mine) if len(names) > 1 else lines
        shown = []
        for line in ours:
            scores = line.scores
            if protocol.judge and line.task == ALL:
                edits = [record for record in mine if row_of(record) == row_of(line)]
                scores = mean_over_tasks(edits, protocol.metrics)
            shown.append((line.task, line.label, scores, "this report"))
        shown += [(row.task, row.model, row.scores, row.source) for row in protocol.published]
        rows = [
            [
                *(Cell(task or "all"), Cell(label)),
                *(_cell(name, scores.get(name)) for name in protocol.metrics),
                Cell(source),
            ]
            for task, label, scores, source in shown
        ]
        labels = (METRICS[name].label for name in protocol.metrics)
        title = f"{protocol.name}{', beside published rows' * bool(protocol.published)}"
        about = [protocol.about, *protocol.notes]
        yield Table(title, about, ["task", "model", *labels, "from"], rows, range(len(ours)))


def _markdown(table: Table) -> str:
    rows = [table.heads, ["---"] * len(table.heads)]
    rows += [[f"{cell.text} {cell.beside}".strip() for cell in row] for row in table.rows]
    lines = [f"| {' | '.join(map(escaped, row))} |" for row in rows]
    return "\n\n".join([f"\n### {table.title}", *map(escaped, table.about), "\n".join(lines), ""])


def _shown(
    records: Sequence[Record], lines: Sequence[Line], count: int, folder: Path
) -> Iterator[Shown]:
    """The pictures of some cases; sheets are written into the folder."""
    for mine in draw_cases(records, count):
        sheets = {}
        for name, sheet in make_grids(mine):
            save_image(sheet, folder / name)
            sheets[Path(name).stem] = folder / name
        case = mine[0].case
        about = ": ".join(filter(None, [case["task"], case["instruction"]]))
        yield Shown(case["name"], about, make_rows(mine, lines), sheets)


def _write(path: Path, content: str | bytes) -> None:
    """Write a file; bytes of file names that are not text become escapes."""
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
