"""The report of a sweep: table, grids, curves, and the page of them all (layer 4)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from ipx2p.eval.curves import HOW_TO_GET, has_matplotlib, make_curves
from ipx2p.eval.page import make_page
from ipx2p.eval.scores import METRICS, Results, lacking
from ipx2p.eval.tables import Line, escaped, has_choice, markdown
from ipx2p.files import atomic_write
from ipx2p.images import save_image

# Why a picture has no number, by what a metric needs.
LACKING = {"target": "have no target, or are too small", "captions": "have no captions"}


def write_report(
    output: Path,
    lines: Sequence[Line],
    tables: dict[str, str],
    sheets: Iterable[tuple[str, str, Image.Image]],
    about: dict[str, str],
    notes: Sequence[str],
) -> list[Path]:
    """Write the report, and remove the grids and curves of an earlier one.

    Args:
        tables: CSV by file name. sheets: name of the picture, name of the file, sheet.
        about, notes: for the head of the report.
    Returns: the table and the page.
    """
    head = "\n".join(f"- {name}: {escaped(value)}" for name, value in about.items())
    said = "".join(f"{note}\n\n" for note in notes)
    for name, table in tables.items():
        _write(output / name, table)
    _write(output / "table.md", f"# Guidance compared\n\n{head}\n\n{said}{markdown(lines)}")
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
        grids.append((picture, path.stem, path.read_bytes()))
    _write(output / "index.html", make_page(lines, grids, curves, about, notes))
    return [output / "table.md", output / "index.html"]


def make_notes(asked: Sequence[str] | None, metrics: Sequence[str], results: Results) -> list[str]:
    """What the report lacks, and how to get it, but for what was left out on purpose.

    Args:
        asked: metrics that were asked for. metrics: those of the report.
    """
    notes = []
    missing = lacking([trial.case for trial in results.trials], results.clip is not None)
    for need, reason in missing.items() if asked is None else ():
        labels = [m.label.partition(",")[0] for m in METRICS.values() if m.needs == need]
        notes.append(f"No {' and '.join(labels)}: needs {reason}.")
    if not has_matplotlib():
        notes.append(f"No curves: {HOW_TO_GET}.")
    scored = {trial.case: score for trial in results.trials if (score := results.score(trial))}
    for name in metrics:
        count = sum(name in score for score in scored.values())
        if count < len(scored):
            notes.append(
                f"{METRICS[name].label} of {count} of {len(scored)} pictures: the others "
                f"{LACKING[METRICS[name].needs]}."
            )
    return notes


def note_of_choice(lines: Sequence[Line], chosen_on: Path | None) -> list[str]:
    """What the best scales were chosen on, if there was a choice."""
    if not has_choice(lines):
        return []
    if chosen_on is not None:
        return [f"Best scales were chosen on {chosen_on}, and are reported on other pictures."]
    return [
        "Best scales, in the table and in the curves against network evaluations, were chosen on "
        "the reported pictures themselves, which flatters them: choose them on others with "
        "--select-on."
    ]


def _write(path: Path, content: str | bytes) -> None:
    """Write a file; bytes of file names that are not text become escapes."""
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
