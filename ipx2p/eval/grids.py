"""Sheets of a sweep: guidance scale against image guidance scale, and schemes beside each other
(layer 4)."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from ipx2p.eval.cases import Case
from ipx2p.eval.rows import key_of
from ipx2p.eval.sweep import Trial, scales_of
from ipx2p.images import load_image
from ipx2p.sheets import contact_sheet, text_tile

MIN_CELL, MAX_CELL = 128, 256  # pixels
MAX_WIDTH = 50_000  # of a sheet; a JPEG has at most 65 535
MAX_SLUG = 60


def make_grids(
    trials: Sequence[Trial], folder: Path, *, resolution: int | None, multiple: int
) -> Iterator[tuple[str, str, Image.Image]]:
    """Sheets of the trials' pictures: name of the picture, name for a file, sheet.

    For each picture, sampler, number of steps and seed: one sheet of all schemes at the middle
    image guidance scale, if there are several schemes; then one of each scheme at all scales.
    """
    groups: dict[tuple, list[Trial]] = {}
    for trial in trials:
        s = trial.settings
        groups.setdefault((trial.case, s.sampler, s.num_steps, trial.seed), []).append(trial)
    for (case, sampler, steps, seed), group in groups.items():
        how = f"{sampler}, {steps} steps, seed {seed}"
        before = [case.load(resolution, multiple)]
        if case.target:
            before.append(case.load_target(before[0].size))
        schemes = [*dict.fromkeys(trial.settings.guidance for trial in group)]
        if len(schemes) > 1:
            sheet = _overview(group, schemes, before, folder, f"{case.instruction} ({how}")
            yield case.name, _name(case, "schemes", how), sheet
        for scheme in schemes:
            mine = [trial for trial in group if trial.settings.guidance == scheme]
            sheet = _grid(mine, before, folder, f"{scheme}: {case.instruction} ({how})")
            yield case.name, _name(case, scheme, how), sheet


def _grid(
    trials: Sequence[Trial], before: list[Image.Image], folder: Path, title: str
) -> Image.Image:
    """Image guidance scales downwards, guidance scales to the right."""
    placed = {(*scales_of(trial.settings).values(),): trial for trial in trials}
    scales, image_scales = (_sorted(values) for values in zip(*placed, strict=True))
    return _sheet(
        [[placed.get((scale, image_scale)) for scale in scales] for image_scale in image_scales],
        before,
        folder,
        column_labels=[_label("guidance scale", scale) for scale in scales],
        row_labels=[_label("image guidance scale", scale) for scale in image_scales],
        title=title,
    )


def _overview(
    trials: Sequence[Trial],
    schemes: Sequence[str],
    before: list[Image.Image],
    folder: Path,
    title: str,
) -> Image.Image:
    """Schemes downwards, guidance scales to the right, at the middle image guidance scale.

    A scheme that does not use a scale stands at all of its values.
    """
    placed = {
        (trial.settings.guidance, *scales_of(trial.settings).values()): trial for trial in trials
    }
    _, scales, image_scales = (_sorted(values) for values in zip(*placed, strict=True))
    middle = image_scales[len(image_scales) // 2]

    def at(scheme: str, scale: float | None) -> Trial | None:
        keys = itertools.product([scheme], (scale, None), (middle, None))
        return next((placed[key] for key in keys if key in placed), None)

    where = "" if middle is None else f", {_label('image guidance scale', middle)}"
    return _sheet(
        [[at(scheme, scale) for scale in scales] for scheme in schemes],
        before,
        folder,
        column_labels=[_label("guidance scale", scale) for scale in scales],
        row_labels=schemes,
        title=f"{title}{where})",
    )


def _sorted(values: Iterable[float | None]) -> list[float | None]:
    """Values of a scale, each once; None, for those that do not use it, where there is no other."""
    return sorted({*values} - {None}) or [None]


def _label(name: str, scale: float | None) -> str:
    return f"any {name}" if scale is None else f"{name} {scale:g}"


def _sheet(
    cells: Sequence[Sequence[Trial | None]],
    before: list[Image.Image],
    folder: Path,
    *,
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    title: str,
) -> Image.Image:
    """The edits, and in front of the first row the source, and the target where there is one.

    An edit that was not finite has no picture, and says so.
    """
    cell = min(MAX_CELL, max(MIN_CELL, *before[0].size), MAX_WIDTH // (len(cells[0]) + 4))

    def picture(trial: Trial | None) -> Image.Image | None:
        if trial is None:
            return None
        path = folder / trial.file
        return load_image(path) if path.exists() else text_tile("not finite", cell)

    rows = [
        [*(image if index == 0 else None for image in before), *map(picture, row)]
        for index, row in enumerate(cells)
    ]
    return contact_sheet(
        rows,
        column_labels=[*("source", "target")[: len(before)], *column_labels],
        row_labels=row_labels,
        title=title,
        cell=cell,
    )


def _name(case: Case, what: str, how: str) -> str:
    """A file name; names that look alike once cut are told apart by a hash."""
    slugs = (re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") for text in (case.name, what, how))
    stem = "_".join(slug[:MAX_SLUG] for slug in slugs)
    return f"{stem}_{key_of([case.name, what, how])[:6]}.jpg"
