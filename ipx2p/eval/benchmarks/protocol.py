"""How a published benchmark is measured, and what others published on it (layer 4).

Each file of this package declares its protocols below the readers of their layouts. The published
rows of all are in published.csv, in the units of our metrics and not in those of the papers.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ipx2p.data.published.source import Example, Fault
from ipx2p.errors import InputError
from ipx2p.eval.cases import Case
from ipx2p.files import atomic_write, digest_bytes, read_json
from ipx2p.images import load_image, load_image_bytes, pixels01_from_image

PUBLISHED = Path(__file__).parent / "published.csv"
SIDE = 512  # of the square that masks count in
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}


class PublishedRow(NamedTuple):
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
    metrics: those that are published.
    preprocessing: of pictures for CLIP, see `ipx2p.eval.networks.Clip`.
    score_at_target: edits are resized to the target's own size (the source's where there is no
        target) by Pillow's bicubic filter before pixels are compared; networks see them as they
        are. False: they must have that size.
    native: pictures are edited at their own size.
    pictures: of how many the published rows are means; 0 if no one counts.
    notes: what may be compared with the published rows, and what not.
    judge: who gives the scores, "" for those that are measured here. The number for all tasks of a
        judged benchmark is the mean of the tasks' means.
    preset: options of `evaluate` that the published numbers were made with, its defaults here.
    """

    name: str
    about: str
    read: Callable[[Path, Path], list[Case]]
    metrics: tuple[str, ...]
    preprocessing: str = "crop"
    score_at_target: bool = True
    native: bool = False
    pictures: int = 0
    notes: tuple[str, ...] = ()
    judge: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> tuple[str, ...]:
        """Its metrics that are measured here."""
        return () if self.judge else self.metrics

    @property
    def published(self) -> list[PublishedRow]:
        """The rows to print beside ours."""
        rows = []
        for row in csv.DictReader(PUBLISHED.read_text().splitlines()):
            if row["benchmark"] == self.name:
                scores = map(float, row["scores"].split())
                named = dict(zip(row["metrics"].split(), scores, strict=True))
                rows.append(PublishedRow(row["model"], named, row["source"], row["task"]))
        return rows


# Without a benchmark: pictures are compared at the size of the edits.
OWN_PAIRS = Protocol(
    "", "own pairs", lambda *_: [], (), score_at_target=False, preprocessing="square"
)


def usable(found: Iterable[Example | Fault]) -> list[Example]:
    """All of the examples. InputError for the first fault: a benchmark with a part missing would
    be another benchmark.
    """
    examples = [*found]
    faults = [item for item in examples if isinstance(item, Fault)]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(f"{faults[0].reason}{more}: unpack the set again, all of it is measured")
    return examples


def entries(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The objects that a JSON file lists by name, each with `where` it is, for errors."""
    listed = read_json(path)
    if not listed:
        raise InputError(f"{path} lists nothing: unpack the set again")
    for key, item in listed.items():
        where = f"{path}: {key!r}"
        if not isinstance(item, dict):
            raise InputError(f"{where} is {item!a:.80}, expected an object")
        yield key, item, where


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


def read_mask(pairs: Sequence[int] | Path) -> Tensor:
    """The mask of a case, (H, W), 1 where the picture may change.

    A picture is 1 where it is light. Runs are over (512, 512), as PIE-Bench decodes them: they end
    with the square, and its border of one pixel always counts as changed.
    """
    if isinstance(pairs, Path):
        return (pixels01_from_image(load_image(pairs)).mean(dim=0) >= 0.5).float()
    mask = torch.zeros(SIDE * SIDE)
    for start, length in zip(pairs[::2], pairs[1::2], strict=True):
        mask[start : start + length] = 1
    mask = mask.view(SIDE, SIDE)
    mask[[0, -1]] = 1
    mask[:, [0, -1]] = 1
    return mask
