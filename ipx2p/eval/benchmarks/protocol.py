"""How a published benchmark is measured, and what others published on it (layer 4).

Each file of this package declares its protocols beside the readers of their layouts, together with
the published rows. Scores of rows are in the units of our metrics, not those of the papers.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ipx2p.eval.cases import Case
from ipx2p.files import atomic_write, digest_bytes
from ipx2p.images import load_image_bytes

VIT_B32, VIT_L14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
VITS16, VITB8 = "facebook/dino-vits16", "facebook/dino-vitb8"


@dataclass(frozen=True)
class PublishedRow:
    """What was published for one model.

    model: its name; "oracle" is the target itself, which shows whether our measure is theirs.
    scores: by our metrics, in their units. source: where it was read. task: one of the benchmark's,
    "" for all together.
    """

    model: str
    scores: Mapping[str, float]
    source: str
    task: str = ""


@dataclass(frozen=True)
class Protocol:
    """A benchmark as it is published.

    read: (root of the set, folder for pictures that lie in a table) -> cases.
    metrics: those that are published. clip, dino: ids of the networks that measured; "" if none.
    score_at_target: edits are resized to the target's own size (the source's where there is no
        target) by Pillow's bicubic filter before pixels are compared; networks see them as they
        are. False: they must have that size.
    native: pictures are edited at their own size.
    published: rows to print beside ours. notes: what may be compared with them, and what not.
    judge: of answers that are read back, "" for those that are measured here.
    preset: settings of the edits that the published numbers were made with.
    """

    name: str
    about: str
    read: Callable[[Path, Path], list[Case]]
    metrics: tuple[str, ...]
    clip: str = ""
    dino: str = ""
    score_at_target: bool = True
    native: bool = False
    published: tuple[PublishedRow, ...] = ()
    notes: tuple[str, ...] = ()
    judge: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)


def rows(source: str, metrics: str, task: str = "", **scores: tuple[float, ...]) -> tuple:
    """Published rows of one table: names of metrics, and by model their numbers in that order.

    Underscores in the names of models stand for spaces.
    """
    names = metrics.split()
    return tuple(
        PublishedRow(model.replace("_", " "), dict(zip(names, given, strict=True)), source, task)
        for model, given in scores.items()
    )


def extract(data: bytes, folder: Path, where: str) -> Path:
    """A picture of a table as a file, named by its content and written once.

    Raises: InputError that names `where` if it is no picture.
    """
    stem = folder / digest_bytes(data)
    for path in (stem.with_suffix(suffix) for suffix in (".png", ".jpg", ".webp")):
        if path.is_file():
            return path
    load_image_bytes(data, where)
    with Image.open(io.BytesIO(data)) as image:
        suffix = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}.get(image.format)
    path = stem.with_suffix(suffix or ".png")
    with atomic_write(path) as temporary:
        if suffix:
            temporary.write_bytes(data)
        else:
            load_image_bytes(data, where).save(temporary, "PNG")
    return path
