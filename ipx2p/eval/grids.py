"""What a report shows of a case: edits beside each other, and sheets of all scales (layer 4)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from ipx2p.eval.lines import ALL, SCALES, Line, sortable
from ipx2p.eval.models import stacks_of
from ipx2p.eval.records import CLASSICAL_ROW, IDENTITY, ORACLE, Record, file_stem
from ipx2p.eval.scores import METRICS
from ipx2p.eval.tables import match_change
from ipx2p.images import load_image
from ipx2p.seeds import generator
from ipx2p.sheets import contact_sheet, text_tile

MIN_CELL, MAX_CELL = 128, 256  # pixels
MAX_SIDE = 50_000  # of a sheet; a JPEG has at most 65 535
MAX_TILES = 16  # edits of a picture that are shown one by one
MAX_NOTED = 2  # metrics below a picture, besides its change
SHOWN_AS = {IDENTITY: "source", ORACLE: "target"}


class Tile(NamedTuple):
    """A picture beside others: its label, its file (None: not finite), and its numbers."""

    label: str
    path: Path | None
    note: str = ""


def by_case(records: Iterable[Record]) -> list[list[Record]]:
    """The records of each case."""
    cases: dict[tuple, list[Record]] = {}
    for record in records:
        names = ("benchmark", "name", "task", "instruction", "group")
        cases.setdefault(tuple(record.case.get(name) for name in names), []).append(record)
    return [mine for _, mine in sorted(cases.items(), key=lambda item: [*map(str, item[0])])]


def draw_cases(records: Sequence[Record], count: int) -> list[list[Record]]:
    """The records of some cases, drawn at random but always the same, of all tasks in turn."""
    cases = by_case(records)
    left = torch.randperm(len(cases), generator=generator(0, "report pictures")).tolist()
    chosen: list[int] = []

    def seen(place: int) -> tuple[int, ...]:
        """How often its task and its photograph are drawn already."""
        own, drawn = cases[place][0].case, [cases[one][0].case for one in chosen]
        return tuple(sum(one[name] == own[name] for one in drawn) for name in ("task", "group"))

    while left and len(chosen) < count:
        chosen.append(min(left, key=seen))
        left.remove(chosen[-1])
    return [cases[place] for place in sorted(chosen)]


def make_rows(records: Sequence[Record], lines: Sequence[Line]) -> dict[str, list[Tile]]:
    """The pictures of one case, of its first seed, in rows by title.

    The first row has the source, all edits if they are few, and the target. Others have each scheme
    once: at equal scales, at equal measured change, at its best scales.
    """
    lines = [line for line in lines if line.task == ALL]
    seed = next((record.seed for record in records if record.seed is not None), None)
    there = {record.row: record for record in records if record.seed in (None, seed)}
    before = [line for line in lines if line.model in (IDENTITY, CLASSICAL_ROW)]
    after = [line for line in lines if line.is_built_in and line not in before]
    after.sort(key=lambda line: line.model == ORACLE)
    edits = [line for line in lines if not line.is_built_in]
    few = edits if len(edits) <= MAX_TILES else []
    rows = {"": [*before, *few, *after]}
    change, at_change, at_scales = match_change(edits)
    if len(edits) > len(at_change):  # a scheme has several scales
        rows["At equal scales"] = at_scales
        title = f"At equal measured change, {change:.2f} % on average, as near as there is"
        rows[title] = at_change
    if not few:
        for name, metric in METRICS.items():
            best = [line for line in edits if name in line.best]
            rows[f"At the best scales by {metric.label}"] = best
    found = {
        title: [_tile(line, there[line.row]) for line in chosen if line.row in there]
        for title, chosen in rows.items()
    }
    return {title: tiles for title, tiles in found.items() if tiles}


def _tile(line: Line, record: Record) -> Tile:
    """With the numbers of the first metrics that choose, and of its change."""
    chooses = [name for name in METRICS if METRICS[name].chooses and name in record.scores]
    names = chooses[:MAX_NOTED] + [name for name in ["change"] if name in record.scores]
    noted = (
        f"{METRICS[name].label.partition(',')[0]} {record.scores[name]:.{METRICS[name].digits}f}"
        for name in names
    )
    label = SHOWN_AS.get(line.model, line.label)
    return Tile(label, record.path if record.picture else None, ", ".join(noted))


def make_overview(records: Sequence[Record], models: Sequence[str], count: int) -> Image.Image:
    """A sheet of some cases: the source, the classical edit, those of each model, the target.

    Of a model with several settings or seeds, the first edit is shown.
    """
    cases = draw_cases(records, count)
    if any(record.model == CLASSICAL_ROW for case in cases for record in case):
        models = [CLASSICAL_ROW, *models]
    cell = min(MAX_CELL, MAX_SIDE // (max(len(cases), len(models)) + 4))

    def pictures(case: Sequence[Record]) -> Iterator[Image.Image | None]:
        for model in (IDENTITY, *models, ORACLE):
            mine = [record for record in case if record.model == model]
            mine.sort(key=lambda record: (sortable(record.seed), record.row))
            if not mine:
                yield None
            elif mine[0].picture is None:
                yield text_tile("not finite", cell)
            else:
                yield load_image(mine[0].path)

    heads = [case[0].case for case in cases]
    return contact_sheet(
        [[*pictures(case)] for case in cases],
        column_labels=["input", *models, "target"],
        row_labels=[f"{head['task']}: {head['instruction']}" for head in heads],
        cell=cell,
    )


def make_grids(records: Sequence[Record]) -> Iterator[tuple[str, Image.Image]]:
    """Sheets of the edits of one case at all scales: name for a file, sheet.

    For each model, sampler, number of steps and seed with several scales: a column for each
    guidance scale, a row for each scheme and image guidance scale.
    """
    before = [record for model in SHOWN_AS for record in records if record.model == model]
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record.settings is not None:
            how = (record.model, *record.row[2], record.settings["sampler"])
            how += (f"{record.settings['num_steps']} steps", f"seed {record.seed}")
            groups.setdefault(how, []).append(record)
    case = records[0].case
    for how, group in groups.items():
        if len({tuple(record.settings[name] for name in SCALES) for record in group}) > 1:
            model, *_, sampler, steps, seed = how
            title = f"{case['instruction']} ({model}, {sampler}, {steps}, {seed})"
            yield f"{file_stem(case['name'], *how)}.jpg", _sheet(before, group, title)


def _sheet(before: Sequence[Record], edits: Sequence[Record], title: str) -> Image.Image:
    """Rows of edits, each behind the source and the target, if there is one."""
    at = {"guidance": [stacks_of(record.settings) for record in edits]}
    at |= {name: [record.settings[name] for record in edits] for name in SCALES}
    columns = sorted({*at["guidance_scale"]}, key=sortable)
    rows = sorted(
        {*zip(at["guidance"], at["image_guidance_scale"], strict=True)},
        key=lambda row: (at["guidance"].index(row[0]), sortable(row[1])),
    )
    placed = dict(zip(zip(*at.values(), strict=True), edits, strict=True))
    shown = [load_image(record.path) for record in before]
    most = MAX_SIDE // (max(len(columns), len(rows)) + 4)
    cell = min(MAX_CELL, max(MIN_CELL, *shown[0].size), most)

    def picture(record: Record | None) -> Image.Image | None:
        if record is None:
            return None
        return load_image(record.path) if record.picture else text_tile("not finite", cell)

    return contact_sheet(
        [
            [*shown, *(picture(placed.get((scheme, scale, image_scale))) for scale in columns)]
            for scheme, image_scale in rows
        ],
        column_labels=[
            *(SHOWN_AS[record.model] for record in before),
            *("no guidance scale" if one is None else f"guidance scale {one:g}" for one in columns),
        ],
        row_labels=[
            scheme if scale is None else f"{scheme}, image guidance scale {scale:g}"
            for scheme, scale in rows
        ],
        title=title,
        cell=cell,
    )
