"""What a report shows of a case: edits beside each other, and sheets of all scales (layer 4)."""

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ipx2p.eval.fronts import match_change
from ipx2p.eval.lines import ALL, SCALES, Line
from ipx2p.eval.records import CLASSICAL_ROW, IDENTITY, ORACLE, Record, file_stem, key_of
from ipx2p.eval.scores import METRICS
from ipx2p.images import load_image
from ipx2p.seeds import generator
from ipx2p.sheets import contact_sheet, text_tile

MIN_CELL, MAX_CELL = 128, 256  # pixels
MAX_WIDTH = 50_000  # of a sheet; a JPEG has at most 65 535
MAX_TILES = 16  # edits of a picture that are shown one by one
MAX_NOTED = 2  # metrics below a picture, besides its change
BUILT_IN_LABELS = {IDENTITY: "source", ORACLE: "target"}


class Tile(NamedTuple):
    """A picture beside others: its label, its file (None: not finite), and its numbers."""

    label: str
    path: Path | None
    note: str = ""


def variant_of(of: Record | Line) -> tuple[Hashable, ...]:
    """All of a model and its settings but the scales."""
    names = ("guidance", "sampler", "spacing", "num_steps") if of.settings else ()
    return of.model, *(of.settings[name] for name in names)


def scales_of(of: Record | Line) -> tuple[float | None, ...]:
    """Both scales; None for one that is not used."""
    return tuple((of.settings or {}).get(name) for name in SCALES)


def by_case(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    """The records of each case."""
    cases: dict[tuple, list[Record]] = {}
    for record in records:
        names = ("name", "task", "instruction", "group")
        cases.setdefault(tuple(record.case.get(name) for name in names), []).append(record)
    return cases


def draw_cases(records: Sequence[Record], count: int) -> list[list[Record]]:
    """The records of some cases, drawn at random but always the same, of all tasks in turn."""
    cases = [*by_case(records).values()]
    left = torch.randperm(len(cases), generator=generator(0, "report pictures")).tolist()
    chosen: list[int] = []
    while left and len(chosen) < count:
        drawn = [cases[place][0].case for place in chosen]

        def seen(place: int, drawn: Sequence[dict] = drawn) -> tuple[int, ...]:
            """How often its task and its photograph are drawn already."""
            own = cases[place][0].case
            return tuple(sum(one[n] == own[n] for one in drawn) for n in ("task", "group"))

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
    there = {row_of(record): record for record in records if record.seed in (None, seed)}

    def tiles(chosen: Iterable[Line]) -> list[Tile]:
        found = [(line, there[place]) for line in chosen if (place := row_of(line)) in there]
        return [
            Tile(
                BUILT_IN_LABELS.get(record.model, line.label),
                record.path if record.picture else None,
                _noted(record),
            )
            for line, record in found
        ]

    before = [line for line in lines if line.model in (IDENTITY, CLASSICAL_ROW)]
    after = [line for line in lines if line.is_built_in and line not in before]
    after.sort(key=lambda line: line.model == ORACLE)
    edits = [line for line in lines if not line.is_built_in]
    few = edits if len(edits) <= MAX_TILES else []
    rows = {"": [*before, *few, *after]}
    change, matched = match_change(edits)
    if len(edits) > len({variant_of(line) for line in edits}):  # there are several scales
        if matched and all(one.at_scales for one in matched):
            rows["At equal scales"] = [one.at_scales for one in matched]
        if matched:
            title = f"At equal measured change, {change:.2f} % on average, as near as there is"
            rows[title] = [one.at_change for one in matched]
    if not few:
        for name, metric in METRICS.items():
            best = [line for line in edits if name in line.best]
            rows[f"At the best scales by {metric.label}"] = best
    found = {title: tiles(chosen) for title, chosen in rows.items()}
    return {title: some for title, some in found.items() if some}


def row_of(of: Record | Line) -> tuple[str, ...]:
    """Equal for a line and its records."""
    weights = of.weights if isinstance(of, Line) else of.made_with.get("weights_digest") or ""
    return of.model, key_of(of.settings), weights if of.settings else ""


def _noted(record: Record) -> str:
    """Its numbers, of the metrics that choose, and its change."""
    chooses = [name for name in record.scores if name in METRICS and METRICS[name].chooses]
    names = chooses[:MAX_NOTED] + [name for name in ["change"] if name in record.scores]
    return ", ".join(
        f"{METRICS[name].label.partition(',')[0]} {record.scores[name]:.{METRICS[name].digits}f}"
        for name in names
    )


def make_grids(records: Sequence[Record]) -> Iterator[tuple[str, Image.Image]]:
    """Sheets of the edits of one case at all scales: name for a file, sheet.

    For each model, sampler, number of steps and seed: one sheet of all schemes at the middle image
    guidance scale, if there are several schemes; then one of each scheme at all scales.
    """
    before = [record for model in BUILT_IN_LABELS for record in records if record.model == model]
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record.settings is not None:
            s = record.settings
            key = (record.model, s["sampler"], s["num_steps"], record.seed)
            groups.setdefault(key, []).append(record)
    case = records[0].case
    for (model, sampler, steps, seed), group in groups.items():
        how = f"{model}, {sampler}, {steps} steps, seed {seed}"
        if len({scales_of(record) for record in group}) == 1:
            continue
        for name, title, columns, rows in _layouts(group):
            sheet = _sheet(before, columns, rows, f"{title}{case['instruction']} ({how})")
            yield f"{file_stem(case['name'], name, how)}.jpg", sheet


def _layouts(records: Sequence[Record]) -> Iterator[tuple[str, str, list[str], dict[str, list]]]:
    """Name, beginning of the title, labels of the columns, and rows of records by label.

    A scheme that does not use a scale appears at all of its values.
    """
    placed = {(record.settings["guidance"], *scales_of(record)): record for record in records}
    schemes = [*dict.fromkeys(scheme for scheme, _, _ in placed)]

    def at(scheme: str, scale: float | None, image_scale: float | None) -> Record | None:
        keys = itertools.product([scheme], (scale, None), (image_scale, None))
        return next((placed[key] for key in keys if key in placed), None)

    for name in (["schemes"] if len(schemes) > 1 else []) + schemes:
        shown = schemes if name == "schemes" else [name]
        scales, images = (_sorted(key[i] for key in placed if key[0] in shown) for i in (1, 2))
        columns = [_label(SCALES[0], scale) for scale in scales]
        if name == "schemes":
            middle = images[len(images) // 2]
            title = "" if middle is None else f"{_label(SCALES[1], middle)}: "
            shown = {scheme: (scheme, middle) for scheme in schemes}
        else:
            title = f"{name}: "
            shown = {_label(SCALES[1], image): (name, image) for image in images}
        rows = {row: [at(one, s, image) for s in scales] for row, (one, image) in shown.items()}
        yield name, title, columns, rows


def _sorted(values: Iterable[float | None]) -> list[float | None]:
    """The values of a scale, or None alone if no scheme uses it."""
    return sorted({*values} - {None}) or [None]


def _label(name: str, scale: float | None) -> str:
    name = name.replace("_", " ")
    return f"any {name}" if scale is None else f"{name} {scale:g}"


def _sheet(
    before: Sequence[Record], columns: list[str], rows: dict[str, list[Any]], title: str
) -> Image.Image:
    """The edits; before the first row, the source and the target, if there is one."""
    shown = [load_image(record.path) for record in before]
    side = max(MIN_CELL, *shown[0].size)
    cell = min(MAX_CELL, side, MAX_WIDTH // (len(columns) + 4))

    def picture(record: Record | None) -> Image.Image | None:
        if record is None:
            return None
        return load_image(record.path) if record.picture else text_tile("not finite", cell)

    return contact_sheet(
        [
            [*(image if index == 0 else None for image in shown), *map(picture, row)]
            for index, row in enumerate(rows.values())
        ],
        column_labels=[*(BUILT_IN_LABELS[record.model] for record in before), *columns],
        row_labels=[*rows],
        title=title,
        cell=cell,
    )
