"""The report of records: tables, pictures, curves, and the page of them all (layer 4).

OUTPUT/  index.html  table.md  table.csv  table.tex  differences.csv  edits.csv  grids/  curves/

It is made from records and their pictures alone: no weights, no manifest, no photographs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.protocol import Protocol
from ipx2p.eval.curves import HOW_TO_GET, has_matplotlib, make_curves
from ipx2p.eval.grids import by_case, draw_cases, make_grids, make_rows
from ipx2p.eval.intervals import Difference, Estimate
from ipx2p.eval.lines import ALL, Line, make_lines
from ipx2p.eval.page import Cell, Shown, Table, make_page
from ipx2p.eval.records import Record
from ipx2p.eval.scores import METRICS
from ipx2p.files import atomic_write
from ipx2p.images import save_image

TITLE = "Edits compared"
GRIDS = 4  # pictures that are shown
MAX_INSTRUCTIONS = 3  # in the head


def write_report(
    output: Path,
    records: Sequence[Record],
    *,
    baseline: str | None = None,
    grids: int = GRIDS,
    about: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    protocols: Mapping[str, Protocol] | None = None,
) -> list[Path]:
    """Write the report, and remove the grids and curves of an earlier one.

    Args:
        baseline: label or model of a line that the others are compared with, besides identity.
        grids: how many pictures are shown. about: more for the head, by name. notes: what is
            missing, and how to get it. protocols: of published benchmarks, by name.
    Returns: the table and the page.
    Raises: InputError for records that do not compare, or a picture that is gone.
    """
    records = comparable(records)
    lines = make_lines(records, baseline)
    reported = [record for record in records if not record.selects]
    about = {**(about or {}), **about_of(reported)}
    notes = [*notes, *notes_of(records, lines)]
    published = _published(reported, lines, protocols or {})
    for name, text in texts_of(records, lines, about, notes).items():
        _write(output / name, text)
    for folder in ("grids", "curves"):
        for path in filter(Path.is_file, (output / folder).glob("*")):
            path.unlink()
    curves = make_curves(lines) if has_matplotlib() else []
    for curve in curves:
        _write(output / "curves" / f"{curve.name}.png", curve.png)
    shown = []
    for mine in draw_cases(reported, grids):
        sheets = {}
        for name, sheet in make_grids(mine):
            path = output / "grids" / name
            save_image(sheet, path)
            sheets[path.stem] = path
        case = mine[0].case
        text = ": ".join(filter(None, [case.get("task"), case["instruction"]]))
        shown.append(Shown(case["name"], text, make_rows(mine, lines), sheets))
    page = make_page(
        TITLE,
        about=about,
        notes=notes,
        remarks=remarks_of(lines),
        tables=[_table_of(lines), *_differences(lines), *published],
        curves=curves,
        shown=shown,
    )
    _write(output / "index.html", page)
    return [output / "table.md", output / "index.html"]


def comparable(records: Sequence[Record]) -> list[Record]:
    """The records; models of one name that were made differently get the name of their folder.

    Raises: InputError for a case that has two sizes or contents, so that its scores do not compare.
    """
    made: dict[str, dict[tuple, None]] = {}
    seen: dict[tuple, Record] = {}
    for record in records:
        how = (*(f"{name} {value}" for name, value in record.made_with.items()),)
        made.setdefault(record.model, {})[how] = None
        if record.settings is None and record.is_built_in:
            case = record.case
            key = record.model, case["name"], case["task"], case["instruction"]
            first = seen.setdefault(key, record)
            if first.picture != record.picture:
                sizes = (f"{one.folder} ({_size(one)})" for one in (first, record))
                raise InputError(
                    f"the {record.model} picture of {case['name']} differs in {' and '.join(sizes)}"
                    ": expected edits of the same pictures at one size, report them apart"
                )
    return [
        replace(record, model=f"{record.model} ({record.folder.name})")
        if len(made[record.model]) > 1 and not record.is_built_in
        else record
        for record in records
    ]


def _size(record: Record) -> str:
    picture = record.picture or {}
    return f"{picture.get('width')} x {picture.get('height')}"
