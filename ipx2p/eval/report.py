"""The report of a sweep: table, grids, curves, and the page of them all (layer 4)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from ipx2p.eval.curves import HOW_TO_GET, has_matplotlib, make_curves
from ipx2p.eval.page import Grid, make_page
from ipx2p.eval.scores import METRICS
from ipx2p.eval.tables import Line, csv_of_lines, markdown
from ipx2p.files import atomic_write
from ipx2p.images import save_image


def write_report(
    output: Path,
    lines: Sequence[Line],
    csv_of_edits: str,
    sheets: Iterable[tuple[str, str, Image.Image]],
    about: dict[str, str],
    metrics: Sequence[str],
) -> list[Path]:
    """Write everything that people read; what an earlier report left of grids and curves goes.

    Args:
        sheets: name of the picture, name of the file, sheet.
        about: for the head of the report. metrics: what was measured.
    Returns: the page and the table.
    """
    notes = make_notes(metrics)
    for folder in ("grids", "curves"):
        for path in (output / folder).glob("*"):
            path.unlink()
    curves = make_curves(lines) if has_matplotlib() else []
    for curve in curves:
        _write(output / "curves" / f"{curve.name}.png", curve.png)
    grids = []
    for picture, name, sheet in sheets:
        path = output / "grids" / name
        save_image(sheet, path)
        grids.append(Grid(picture, path.stem, path.read_bytes()))
    head = "\n".join(f"- {name}: {value}" for name, value in about.items())
    told = "".join(f"{note}\n\n" for note in notes)
    texts = {
        "table.csv": csv_of_lines(lines),
        "edits.csv": csv_of_edits,
        "table.md": f"# Guidance compared\n\n{head}\n\n{told}{markdown(lines)}",
        "index.html": make_page(lines, grids, curves, about, notes),
    }
    for name, text in texts.items():
        _write(output / name, text.encode())
    return [output / "table.md", output / "index.html"]


def make_notes(metrics: Sequence[str]) -> list[str]:
    """What the report lacks, and how to get it."""
    notes = []
    if not any(METRICS[name].needs in ("clip", "captions") for name in metrics):
        notes.append("No CLIP columns: name a CLIP model with --clip to get them.")
    elif "clip_direction" not in metrics:
        notes.append(
            "No CLIP direction similarity and no trade-off: they need source_caption and "
            "target_caption in the manifest, or on the command line."
        )
    if not any(METRICS[name].needs == "targets" for name in metrics):
        notes.append("No PSNR and SSIM: they need targets, by --manifest or --target.")
    if not has_matplotlib():
        notes.append(f"No curves: {HOW_TO_GET}.")
    return notes


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
