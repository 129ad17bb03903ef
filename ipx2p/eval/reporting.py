"""The report of records: tables, pictures, curves, and the page of them all (layer 4).

OUTPUT/  index.html  table.md  table.csv  table.tex  edits.csv  chosen_on.csv  grids/  curves/

It is made from records and their pictures alone: no weights, no manifest, no photographs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipx2p.eval.benchmarks.judged import mean_over_tasks
from ipx2p.eval.benchmarks.registry import PROTOCOLS
from ipx2p.eval.curves import HOW_TO_GET, has_matplotlib, make_curves
from ipx2p.eval.grids import by_case, draw_cases, make_grids, make_rows
from ipx2p.eval.intervals import LEAST
from ipx2p.eval.lines import ALL, EFFECTIVE, Line, has_choice, make_lines
from ipx2p.eval.page import Shown, make_page
from ipx2p.eval.records import Record, names_of
from ipx2p.eval.scores import METRICS
from ipx2p.eval.tables import (
    COLUMNS,
    Cell,
    Table,
    cell,
    common_settings,
    csv_of_edits,
    csv_of_lines,
    escaped,
    latex,
    markdown,
    tables_of,
    tables_of_match,
)
from ipx2p.files import atomic_write
from ipx2p.images import save_image

TITLE = "Edits compared"
MAX_TOLD = 3  # instructions in the head


def write_report(
    output: Path,
    records: Sequence[Record],
    baseline: str | None,
    grids: int,
    *,
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write the report, and remove the grids and curves of an earlier one.

    Args:
        baseline: label or model of a line that the others are compared with, besides identity.
        grids: how many pictures are shown. notes: what is missing, and how to get it.
    Returns: the table and the page.
    Raises: InputError for records that do not compare, or a picture that is gone.
    """
    lines = make_lines(records, baseline)
    reported = [record for record in records if not record.selects]
    choosing = [replace(record, selects=False) for record in records if record.selects]
    about, notes = about_of(reported, lines), [*notes, *notes_of(reported, choosing, lines)]
    remarks, lesser = remarks_of(lines)
    tables = [*tables_of(lines), *tables_of_match(lines), *published_tables(reported, lines)]
    texts = {
        "table.md": _markdown(about, notes, [*remarks, *lesser], tables),
        "table.csv": csv_of_lines(lines),
        "table.tex": latex(lines),
        "edits.csv": csv_of_edits(reported),
    }
    (output / "chosen_on.csv").unlink(missing_ok=True)
    if choosing:
        texts["chosen_on.csv"] = csv_of_lines(make_lines(choosing))
    for name, text in texts.items():
        _write(output / name, text)
    for folder in ("grids", "curves"):
        for path in filter(Path.is_file, (output / folder).glob("*")):
            path.unlink()
    curves = make_curves(lines) if has_matplotlib() else []
    for curve in curves:
        _write(output / "curves" / f"{curve.name}.png", curve.png)
    shown = [*_shown(reported, lines, grids, output / "grids")]
    words = {"about": about, "notes": notes, "remarks": remarks, "lesser": lesser}
    page = make_page(TITLE, **words, tables=tables, curves=curves, shown=shown)
    _write(output / "index.html", page)
    return [output / "table.md", output / "index.html"]


def _markdown(
    about: dict[str, str], notes: Sequence[str], remarks: Sequence[str], tables: Sequence[Table]
) -> str:
    parts = [
        f"# {TITLE}",
        "\n".join(f"- {name}: {escaped(value)}" for name, value in about.items()),
        *map(escaped, notes),
        "\n".join(f"- {escaped(remark)}" for remark in remarks),
        *map(markdown, tables),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def about_of(records: Sequence[Record], lines: Sequence[Line]) -> dict[str, str]:
    """What was compared, for the head of the report."""
    edits = [record for record in records if record.settings is not None]
    cases = [record.case for record in records]
    models = []
    for record in records:
        made = record.made_with
        if made.get("weights"):
            models.append(f"{record.model}: {made['weights']}, {made['weights_digest'][:6]}")
    sizes = [f"{p['width']} x {p['height']}" for p in (r.picture for r in records) if p]
    facts = {
        "models": _listed(models, between="; "),
        "benchmark": _listed(case.get("benchmark") for case in cases),
        "pictures": f"{len({case['group'] for case in cases})} in {len(by_case(records))} cases; "
        f"width x height: {_listed(sizes, MAX_TOLD)}",
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
        "computed on": _computed_on(edits),
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


def _computed_on(edits: Iterable[Record]) -> str:
    """How and on what device the edits were computed, since their seconds depend on it."""
    ways: dict[str, None] = {}
    for how in (record.computed_on for record in edits if record.computed_on):
        place = how["device"].partition(":")[0]
        threads = f", {how['threads']} threads" if place == "cpu" else ""
        compiled = ", compiled" if how["compiled"] else ""
        branches = "" if how["batch_branches"] else ", one branch at a time"
        device = f"{place} ({how['device_name']}{threads}), {how['dtype']}{compiled}"
        ways[f"{device}, in batches of {how['batch_size']}{branches}"] = None
    several = " (seconds of different ones do not compare)" if len(ways) > 1 else ""
    return "; ".join(ways) + several


def _measured_by(records: Iterable[Record]) -> str:
    """The networks that measured, with the names of their metrics."""
    by_how: dict[str, dict[str, None]] = {}
    for record in records:
        for name, how in record.scored_by.items():
            if how:
                by_how.setdefault(how, {})[name] = None
    return "; ".join(f"{', '.join(names)}: {how}" for how, names in by_how.items())


def notes_of(
    reported: Sequence[Record], choosing: Sequence[Record], lines: Sequence[Line]
) -> list[str]:
    """What a reader of the numbers must know, what is missing, or hardly compares."""
    notes = []
    if few := [line for line in lines if line.scores and line.pictures < LEAST]:
        which = "" if len(few) == len(lines) else " where there are so few"
        notes.append(f"No intervals{which}: they need {LEAST} pictures or more.")
    if has_choice(lines):
        others = len({record.case["name"] for record in choosing})
        notes.append(
            f"Best scales were chosen on {others} other cases, and are reported on these."
            if others
            else "Best scales, in the table and in the curves against network evaluations, were "
            "chosen on the reported pictures themselves, which flatters them: choose on others "
            "with --select-on."
        )
    for name in ("resolution", "dtype"):
        values = {r.made_with.get(name) for r in reported if r.settings is not None}
        if len(values) > 1:
            told = ", ".join(sorted(map(str, values)))
            notes.append(f"Edits were made at different {name}s ({told}): they hardly compare.")
    there = [record for record in reported if record.picture is not None]
    if failed := len(reported) - len(there):
        notes.append(f"{failed} of {len(reported)} edits are not finite, and are in no mean.")
    for name, metric in METRICS.items():
        count = sum(name in record.scores for record in there)
        if 0 < count < len(there) and not all(name in record.scored_by for record in there):
            notes.append(
                f"{metric.label}: measured on {count} of {len(there)} edits so far; run the "
                "command again for the others."
            )
        elif 0 < count < len(there):
            notes.append(
                f"{metric.label}: measured on {count} of {len(there)} edits; the others lack what "
                "it needs, or are too small."
            )
    measured = {name for record in there for name in record.scored_by}
    if undefined := [
        METRICS[n].label for n in METRICS if n in measured.difference(names_of(there))
    ]:
        notes.append(
            f"Not defined for any of these edits: {'; '.join(undefined)}. They lack what it needs, "
            "as a part of the picture that must not change, or are too small."
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


def published_tables(records: Sequence[Record], lines: Sequence[Line]) -> Iterator[Table]:
    """Of a published benchmark: our lines, and the rows that they may be compared with."""
    for protocol in filter(None, [PROTOCOLS.get(records[0].case["benchmark"])]):
        shown = []
        for line in lines:
            scores = line.scores
            if protocol.judge and line.task == ALL:
                edits = [record for record in records if record.row == line.row]
                scores = mean_over_tasks(edits, protocol.metrics)
            shown.append((line.task, line.label, scores, "this report"))
        shown += [(row.task, row.model, row.scores, row.source) for row in protocol.published]
        several = len({task for task, *_ in shown}) > 1
        rows = []
        for task, label, scores, source in shown:
            named = [task or "all"] * several + [label]
            numbers = [cell(name, scores.get(name)) for name in protocol.metrics]
            rows.append([*(Cell(text, text) for text in named), *numbers, Cell(source, source)])
        heads = ["task"] * several + ["model", *(METRICS[name].label for name in protocol.metrics)]
        title = f"{protocol.name}{', beside published rows' * bool(protocol.published)}"
        about = [protocol.about, *protocol.notes]
        yield Table(title, about, [*heads, "from"], rows, range(len(lines)))


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
