"""The report of a sweep: table, grids, curves, and the page of them all (layer 4)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from ipx2p.eval.curves import HOW_TO_GET, has_matplotlib, make_curves
from ipx2p.eval.features import ClipFeatures
from ipx2p.eval.page import Grid, make_page
from ipx2p.eval.rows import Rows
from ipx2p.eval.scores import METRICS, score_key
from ipx2p.eval.sweep import Trial
from ipx2p.eval.tables import Line, csv_of_lines, escaped, markdown
from ipx2p.files import atomic_write
from ipx2p.images import save_image

# Why a picture has no number, by what a metric needs.
LACKING = {"targets": "have no target, or are too small", "captions": "have no captions"}


def write_report(
    output: Path,
    lines: Sequence[Line],
    csv_of_edits: str,
    sheets: Iterable[tuple[str, str, Image.Image]],
    about: dict[str, str],
    notes: Sequence[str],
) -> list[Path]:
    """Write everything that people read; what an earlier report left of grids and curves goes.

    Args:
        sheets: name of the picture, name of the file, sheet.
        about: for the head of the report. notes: what it lacks.
    Returns: the page and the table.
    """
    head = "\n".join(f"- {name}: {escaped(value)}" for name, value in about.items())
    told = "".join(f"{note}\n\n" for note in notes)
    _write(output / "table.csv", csv_of_lines(lines))
    _write(output / "edits.csv", csv_of_edits)
    _write(output / "table.md", f"# Guidance compared\n\n{head}\n\n{told}{markdown(lines)}")
    curves = make_curves(lines) if has_matplotlib() else []
    for folder in ("grids", "curves"):
        for path in filter(Path.is_file, (output / folder).glob("*")):
            path.unlink()
    for curve in curves:
        _write(output / "curves" / f"{curve.name}.png", curve.png)
    grids = []
    for picture, name, sheet in sheets:
        path = output / "grids" / name
        save_image(sheet, path)
        grids.append(Grid(picture, path.stem, path.read_bytes()))
    _write(output / "index.html", make_page(lines, grids, curves, about, notes))
    return [output / "table.md", output / "index.html"]


def make_notes(
    asked: Sequence[str] | None,
    metrics: Sequence[str],
    trials: Sequence[Trial],
    rows: Rows,
    scores: Rows,
    clip: ClipFeatures | None,
) -> list[str]:
    """What the report lacks, and how to get it; nothing of what was left out on purpose.

    Args:
        asked: metrics that were named. metrics: those of the report.
    """
    notes = []
    if asked is None and "clip_image" not in metrics:
        notes.append("No CLIP columns: name a CLIP model with --clip to get them.")
    elif asked is None and "clip_direction" not in metrics:
        notes.append(
            "No CLIP direction similarity and no trade-off: they need source_caption and "
            "target_caption in the manifest, or on the command line."
        )
    if asked is None and "psnr" not in metrics:
        notes.append("No PSNR and SSIM: they need targets, by --manifest or --target.")
    if not has_matplotlib():
        notes.append(f"No curves: {HOW_TO_GET}.")
    cases = {trial.case: trial for trial in trials if "failed" not in rows.by_key[trial.key]}
    for name in metrics:
        there = [
            case
            for case, trial in cases.items()
            if name in scores.by_key[score_key(trial.key, case, clip)]
        ]
        if len(there) < len(cases):
            notes.append(
                f"{METRICS[name].label} of {len(there)} of {len(cases)} pictures: the others "
                f"{LACKING[METRICS[name].needs]}."
            )
    return notes


def _write(path: Path, content: str | bytes) -> None:
    """Names of files may hold bytes that are no text; they are written as escapes."""
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
