"""Sheets of a sweep: guidance scales against each other, and schemes side by side (layer 4)."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from PIL import Image

from ipx2p.eval.cases import Case
from ipx2p.eval.rows import file_stem
from ipx2p.eval.scores import Results
from ipx2p.eval.sweep import Trial, scales_of
from ipx2p.images import load_image
from ipx2p.sheets import contact_sheet, text_tile

MIN_CELL, MAX_CELL = 128, 256  # pixels
MAX_WIDTH = 50_000  # of a sheet; a JPEG has at most 65 535


def make_grids(results: Results, cases: Sequence[Case]) -> Iterator[tuple[str, str, Image.Image]]:
    """Sheets of the edits of some cases: name of the picture, name for a file, sheet.

    For each picture, sampler, number of steps and seed: one sheet of all schemes at the middle
    image guidance scale, if there are several schemes; then one of each scheme at all scales.
    """
    groups: dict[tuple, list[Trial]] = {}
    for trial in results.trials:
        if trial.case in cases:
            s = trial.settings
            groups.setdefault((trial.case, s.sampler, s.num_steps, trial.seed), []).append(trial)
    for (case, sampler, steps, seed), group in groups.items():
        how = f"{sampler}, {steps} steps, seed {seed}"
        for name, title, columns, rows in _layouts(group):
            sheet = _sheet(results, case, columns, rows, f"{title}{case.instruction} ({how})")
            yield case.name, f"{file_stem(case.name, name, how)}.jpg", sheet


def _layouts(trials: Sequence[Trial]) -> Iterator[tuple[str, str, list[str], dict[str, list]]]:
    """Name, beginning of the title, labels of the columns, and rows of trials by label.

    A scheme that does not use a scale appears at all of its values.
    """
    placed = {(t.settings.guidance, *scales_of(t.settings).values()): t for t in trials}
    schemes = [*dict.fromkeys(scheme for scheme, _, _ in placed)]

    def at(scheme: str, scale: float | None, image_scale: float | None) -> Trial | None:
        keys = itertools.product([scheme], (scale, None), (image_scale, None))
        return next((placed[key] for key in keys if key in placed), None)

    for name in (["schemes"] if len(schemes) > 1 else []) + schemes:
        shown = schemes if name == "schemes" else [name]
        scales, images = (_sorted(key[i] for key in placed if key[0] in shown) for i in (1, 2))
        columns = [_label("guidance scale", scale) for scale in scales]
        if name == "schemes":
            middle = images[len(images) // 2]
            title = "" if middle is None else f"{_label('image guidance scale', middle)}: "
            shown = {scheme: (scheme, middle) for scheme in schemes}
        else:
            title = f"{name}: "
            shown = {_label("image guidance scale", image): (name, image) for image in images}
        rows = {row: [at(one, s, image) for s in scales] for row, (one, image) in shown.items()}
        yield name, title, columns, rows


def _sorted(values: Iterable[float | None]) -> list[float | None]:
    """The values of a scale, or None alone if no scheme uses it."""
    return sorted({*values} - {None}) or [None]


def _label(name: str, scale: float | None) -> str:
    return f"any {name}" if scale is None else f"{name} {scale:g}"


def _sheet(
    results: Results, case: Case, columns: list[str], rows: dict[str, list], title: str
) -> Image.Image:
    """The edits; before the first row, the source and the target, if there is one."""
    before = [case.load(results.resolution, results.multiple)]
    if case.target:
        before.append(case.load_target(before[0].size))
    cell = min(MAX_CELL, max(MIN_CELL, *before[0].size), MAX_WIDTH // (len(columns) + 4))

    def picture(trial: Trial | None) -> Image.Image | None:
        if trial is None:
            return None
        path = results.rows.folder / trial.file
        return load_image(path) if path.exists() else text_tile("not finite", cell)

    return contact_sheet(
        [
            [*(image if index == 0 else None for image in before), *map(picture, row)]
            for index, row in enumerate(rows.values())
        ],
        column_labels=[*("source", "target")[: len(before)], *columns],
        row_labels=[*rows],
        title=title,
        cell=cell,
    )
