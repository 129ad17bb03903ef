"""How a published benchmark is measured, and what others published on it (layer 4).

Each file of this package declares its protocols below the readers of their layouts. The published
rows of all are in published.json, in the units of our metrics and not in those of the papers.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ipx2p.eval.cases import Case
from ipx2p.files import atomic_write, digest_bytes, read_json
from ipx2p.images import load_image_bytes

VIT_B32, VIT_L14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
VITS16, VITB8 = "facebook/dino-vits16", "facebook/dino-vitb8"
PUBLISHED = Path(__file__).parent / "published.json"
SIDE = 512  # of the square that masks count in
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}


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
    preprocessing: of pictures for CLIP, see `ipx2p.eval.networks.Clip`.
    score_at_target: edits are resized to the target's own size (the source's where there is no
        target) by Pillow's bicubic filter before pixels are compared; networks see them as they
        are. False: they must have that size.
    native: pictures are edited at their own size.
    notes: what may be compared with the published rows, and what not.
    judge: who gives the scores, "" for those that are measured here. over_tasks: the number for all
        together is the mean of the tasks' means.
    preset: options of `evaluate` that the published numbers were made with, its defaults here.
    """

    name: str
    about: str
    read: Callable[[Path, Path], list[Case]]
    metrics: tuple[str, ...]
    clip: str = ""
    dino: str = ""
    preprocessing: str = "crop"
    score_at_target: bool = True
    native: bool = False
    notes: tuple[str, ...] = ()
    judge: str = ""
    over_tasks: bool = False
    preset: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> tuple[str, ...]:
        """Its metrics that are measured here."""
        return () if self.judge else self.metrics

    @property
    def published(self) -> list[PublishedRow]:
        """The rows to print beside ours: in the file by "model" or "model / task"."""
        rows = []
        for table in read_json(PUBLISHED, list):
            if self.name in table["benchmarks"]:
                for name, scores in table["rows"].items():
                    model, _, task = name.partition(" / ")
                    named = dict(zip(table["metrics"].split(), scores, strict=True))
                    rows.append(PublishedRow(model, named, table["source"], task))
        return rows


# Without a benchmark: pictures are compared at the size of the edits.
OWN_PAIRS = Protocol(
    "", "own pairs", lambda *_: [], (), score_at_target=False, preprocessing="square"
)


def extract(data: bytes, folder: Path, where: str) -> Path:
    """A picture of a table as a file, named by its content and written once.

    Raises: InputError that names `where` if it is no picture.
    """
    stem = folder / digest_bytes(data)
    for suffix in SUFFIXES.values():
        if (path := stem.with_suffix(suffix)).is_file():
            return path
    image = load_image_bytes(data, where)
    with Image.open(io.BytesIO(data)) as stored:
        suffix = SUFFIXES.get(stored.format)
    with atomic_write(path := stem.with_suffix(suffix or ".png")) as temporary:
        if suffix:
            temporary.write_bytes(data)
        else:
            image.save(temporary, "PNG")
    return path


def decode_mask(pairs: Iterable[int]) -> Tensor:
    """The mask of a case, (512, 512), 1 where the picture may change, as PIE-Bench decodes it.

    Runs end with the square, and its border of one pixel always counts as changed.
    """
    numbers = [*pairs]
    mask = torch.zeros(SIDE * SIDE)
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        mask[start : start + length] = 1
    mask = mask.view(SIDE, SIDE)
    mask[[0, -1]] = 1
    mask[:, [0, -1]] = 1
    return mask
