"""Sheets of a sweep: guidance scale against image guidance scale, and schemes beside each other
(layer 4)."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from ipx2p.eval.cases import Case
from ipx2p.eval.rows import key_of
from ipx2p.eval.sweep import Trial
from ipx2p.images import load_image
from ipx2p.sheets import contact_sheet

MIN_CELL, MAX_CELL = 128, 256  # pixels
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
    placed = {(t.settings.image_guidance_scale, t.settings.guidance_scale): t for t in trials}
    image_scales = sorted({image_scale for image_scale, _ in placed})
    scales = sorted({scale for _, scale in placed})
    cells = [[placed.get((image_scale, scale)) for scale in scales] for image_scale in image_scales]
    return _sheet(
        cells,
        before,
        folder,
        column_labels=[f"guidance scale {scale:g}" for scale in scales],
        row_labels=[f"image guidance scale {image_scale:g}" for image_scale in image_scales],
        title=title,
    )


def _overview(
    trials: Sequence[Trial],
    schemes: Sequence[str],
    before: list[Image.Image],
    folder: Path,
    title: str,
) -> Image.Image:
    """Schemes downwards, guidance scales to the right, at the middle image guidance scale."""
    image_scales = sorted({trial.settings.image_guidance_scale for trial in trials})
    middle = image_scales[len(image_scales) // 2]
    shown = [trial for trial in trials if trial.settings.image_guidance_scale == middle]
    placed = {(t.settings.guidance, t.settings.guidance_scale): t for t in shown}
    scales = sorted({scale for _, scale in placed})
    return _sheet(
        [[placed.get((scheme, scale)) for scale in scales] for scheme in schemes],
        before,
        folder,
        column_labels=[f"guidance scale {scale:g}" for scale in scales],
        row_labels=schemes,
        title=f"{title}, image guidance scale {middle:g})",
    )


def _sheet(
    cells: Sequence[Sequence[Trial | None]],
    before: list[Image.Image],
    folder: Path,
    *,
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    title: str,
) -> Image.Image:
    """The edits, and in front of the first row the source, and the target where there is one."""
    rows = [
        [
            *(image if index == 0 else None for image in before),
            *(trial and load_image(folder / trial.file) for trial in row),
        ]
        for index, row in enumerate(cells)
    ]
    return contact_sheet(
        rows,
        column_labels=[*("source", "target")[: len(before)], *column_labels],
        row_labels=row_labels,
        title=title,
        cell=min(MAX_CELL, max(MIN_CELL, *before[0].size)),
    )


def _name(case: Case, what: str, how: str) -> str:
    """A file name; names that look alike once cut are told apart by a hash."""
    slugs = (re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") for text in (case.name, what, how))
    stem = "_".join(slug[:MAX_SLUG] for slug in slugs)
    return f"{stem}_{key_of([case.name, what, how])[:6]}.jpg"
