"""Edit picture files: write results, their settings and a contact sheet (layer 3)."""

import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ipx2p import __version__
from ipx2p.devices import advice_out_of_memory, device_name, dtype_name
from ipx2p.editing.editor import Editor
from ipx2p.editing.full_size import edited_photo, transfer_name
from ipx2p.editing.settings import (
    Edited,
    FolderSettings,
    check_instructions,
    check_needs,
    pick_resolution,
    spread,
)
from ipx2p.errors import InputError
from ipx2p.files import check_writable, write_json
from ipx2p.images import fit, load_image, save_image
from ipx2p.models.unet import UNet
from ipx2p.sheets import contact_sheet
from ipx2p.weights.readers import find_folder

MAX_STEM_BYTES = 200  # file systems allow 255 for a name
ADVICE = "edits are written; try a smaller --resolution, --batch-size 1, or --one-branch-at-a-time"


@dataclass(frozen=True)
class FileEdit:
    """One variant of one edit: the picture is at its final size."""

    path: Path
    image: Image.Image
    instruction: str
    seed: int


def edit_files(
    weights: str,
    paths: Sequence[str | Path],
    instructions: Sequence[str],
    output: Path,
    given: Mapping[str, Any],
    *,
    negative_instruction: str = "",
    weak_weights: str | None = None,
    seed: int = 0,
    num_images: int = 1,
    resolution: int | None = None,
    full_size: bool | str = False,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 4,
    batch_branches: bool = True,
    compile: bool = False,
) -> list[Path]:
    """Edit every picture `num_images` times, with consecutive seeds from `seed`.

    Each result is written as soon as it is finished, to the next free OUTPUT/NAME-000.png, with a
    JSON file of all settings. Several results also get a labelled contact sheet.

    Args:
        paths, instructions: one for each edit, or one for all of them.
        given: settings by name, instead of those of the weights folder; None is not given.
        weak_weights: of a second U-Net, for guidance that needs one.
        resolution: of the long side; None is what the folder says, or was trained at.
        full_size: carry the edits over to the originals, see `Editor.edit`; the sheet stays small.
    Returns: the pictures written, the sheet last.
    Raises: InputError for bad arguments or files, before the weights are loaded where possible.
    """
    folder = find_folder(weights)
    settings = FolderSettings.read(folder).but(given)
    settings.check()
    transfer = transfer_name(full_size)
    check_needs(settings, [negative_instruction], weak_weights is not None)
    resolution, multiple, notes = pick_resolution(folder, resolution, settings.window)
    edits = read_edits(paths, instructions, seed, num_images, resolution, multiple)
    check_writable(output)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    editor, weak = load_editor(folder, weak_weights, device, dtype, compile)
    made_with = {
        "weights": str(weights),
        "weights_folder": str(folder.resolve()),  # where links and hub ids led to
        **asdict(settings),
        **settings.in_full,
        "negative_instruction": negative_instruction,
        "weak_weights": weak_weights and str(weak_weights),
        "resolution": resolution,
        "full_size": transfer,
        "batch_size": batch_size,
        "batch_branches": batch_branches,
        "compile": compile,
        **surroundings(editor),
    }
    written: dict[int, Path] = {}  # index of the edit -> its picture

    def write(index: int, edited: Edited) -> None:
        written[index] = _write(output, edits[index], edited, transfer, made_with)

    with advice_out_of_memory(lambda: f"{len(written)} of {len(edits)} {ADVICE}"):
        result = editor.edit(
            [edit.image for edit in edits],
            [edit.instruction for edit in edits],
            **asdict(settings),
            resolution=None,  # they have it already
            seeds=[edit.seed for edit in edits],
            negative_instructions=negative_instruction,
            weak=weak,
            batch_size=batch_size,
            batch_branches=batch_branches,
            progress=True,
            on_edit=write,
        )
    sheets = _write_sheet(output, edits, result.images, num_images)
    return [*(written[index] for index in range(len(edits))), *sheets]


def load_editor(
    folder: Path, weak_weights: str | None, device: str | torch.device, dtype: str, compile: bool
) -> tuple[Editor, UNet | None]:
    """An editor and the weak network of guidance, if any, with their U-Nets compiled if asked."""
    editor = Editor.load(folder, device=device, dtype=dtype)
    weak = None if weak_weights is None else editor.load_weak(weak_weights)
    for network in filter(None, (editor.unet, weak) if compile else ()):
        network.compile()
    return editor, weak


def _write(
    folder: Path, edit: FileEdit, edited: Edited, transfer: str | None, made_with: dict[str, Any]
) -> Path:
    """Write a result under the next free name, with a JSON file of its settings.

    Its original is read for it alone, since many do not fit into memory.
    """
    path = free_path(folder, edit.path.stem)
    width, height = edited.image.size
    if transfer is None:
        save_image(edited.image, path)
    else:
        photo = edited_photo(edit.path, edit.image, edited.pixels01, transfer)
        height, width = photo.pixels.shape[:2]
        photo.save(path)
    own = {"source": str(edit.path), "instruction": edit.instruction, "seed": edit.seed}
    size = {"width": width, "height": height}
    cost = {"evaluations": edited.evaluations, "seconds": round(edited.seconds, 3)}
    write_json(own | size | cost | made_with, path.with_suffix(".json"))
    return path


def _write_sheet(
    folder: Path, edits: Sequence[FileEdit], results: Sequence[Image.Image], num_images: int
) -> list[Path]:
    """Write the contact sheet of several edits; returns its path, or none."""
    if len(edits) == 1:
        return []
    path = free_path(folder, "sheet")
    save_image(edit_sheet(edits, results, num_images), path)
    return [path]


def surroundings(editor: Editor) -> dict[str, Any]:
    """The device, precision and versions that an edit was computed with."""
    return {
        "device": str(editor.device),
        "device_name": device_name(editor.device),
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(editor.dtype),
        "ipx2p": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_edits(
    paths: Sequence[str | Path],
    instructions: Sequence[str],
    seed: int,
    num_images: int,
    resolution: int,
    multiple: int,
) -> list[FileEdit]:
    """Load the pictures at their final size; the variants of one are adjacent and share it."""
    if num_images < 1:
        raise InputError(f"num_images is {num_images}, expected 1 or more")
    paths, instructions = spread(images=paths, instructions=instructions)
    check_instructions(instructions)
    return [
        FileEdit(Path(path), image, instruction, seed + variant)
        for path, instruction in zip(paths, instructions, strict=True)
        for image in [fit(load_image(path), resolution, multiple)]
        for variant in range(num_images)
    ]


def free_path(folder: Path, stem: str) -> Path:
    """FOLDER/STEM-000.png, or the first number that is free for the picture and its JSON file.

    Stems that are too long for a file system are cut.
    """
    while len(os.fsencode(stem)) > MAX_STEM_BYTES:
        stem = stem[:-1]
    number = 0
    while any(os.path.lexists(folder / f"{stem}-{number:03d}.{kind}") for kind in ("png", "json")):
        number += 1
    return folder / f"{stem}-{number:03d}.png"


def edit_sheet(
    edits: Sequence[FileEdit], results: Sequence[Image.Image], num_images: int
) -> Image.Image:
    """One row per picture: the source, then its variants."""
    firsts = range(0, len(edits), num_images)
    return contact_sheet(
        [[edits[first].image, *results[first : first + num_images]] for first in firsts],
        column_labels=["source", *(f"seed {edit.seed}" for edit in edits[:num_images])],
        row_labels=[edits[first].instruction for first in firsts],
    )
