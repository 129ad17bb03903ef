"""Validation: fixed held-out pairs, edited and measured against what is possible (layer 4).

A restoration score means little alone: beside the PSNR of the edit stand that of the unedited input
and that of the target after a round trip through the autoencoder, which an edit can hardly beat.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import Tensor

from ipx2p.data.pairs import EditPair, Pairs, centre_geometry
from ipx2p.editor import Editor
from ipx2p.images import (
    image_from_pixels01,
    pixels01_from_pixels,
    pixels_from_pixels01,
)
from ipx2p.metrics import psnr
from ipx2p.models.vae import VAE
from ipx2p.seeds import generator
from ipx2p.sheets import contact_sheet
from ipx2p.training.config import ValidationConfig

SHEET_ROWS = 8


@dataclass(frozen=True)
class TaskScore:
    """Mean PSNR in dB over the pairs of one task; input and edit are None for an autoencoder."""

    task: str
    pairs: int
    psnr_input: float | None
    psnr_edit: float | None
    psnr_ceiling: float


@dataclass(frozen=True)
class Report:
    """What a validation found: one score per task, and a sheet of its pictures."""

    scores: list[TaskScore]
    sheet: Image.Image

    def scalars(self) -> dict[str, float]:
        """The numbers under the names that logs use."""
        return {
            f"{name}/{score.task}": value
            for score in self.scores
            for name, value in asdict(score).items()
            if name.startswith("psnr") and value is not None
        }


def score_table(scores: Sequence[TaskScore]) -> str:
    """The scores as text, for people: PSNR on held-out pictures in dB."""
    lines = [f"{'task':<12}{'pairs':>6}{'input dB':>10}{'edit dB':>10}{'VAE ceiling dB':>16}"]
    for score in scores:
        row = (score.psnr_input, score.psnr_edit, score.psnr_ceiling)
        before, after, ceiling = ("-" if value is None else f"{value:.2f}" for value in row)
        lines.append(f"{score.task:<12}{score.pairs:>6}{before:>10}{after:>10}{ceiling:>16}")
    return "\n".join(lines)


def fixed_pairs(pairs: Pairs, *, per_task: int, resolution: int, seed: int) -> list[EditPair]:
    """The first pairs of each task, always cut and degraded alike."""
    items: dict[str, list[int]] = {}
    for item in range(len(pairs)):
        items.setdefault(pairs.task(item), []).append(item)
    return [
        pairs.get(
            item,
            lambda size: centre_geometry(size, resolution),
            generator(seed, "validation", item),
        )
        for task in sorted(items)
        for item in items[task][:per_task]
    ]


class EditValidation:
    """Edits the sources of fixed pairs, with the same noise every time, and scores the results.

    Args:
        vae: stays the same over a run, and so does the ceiling that it sets.
    """

    def __init__(
        self, pairs: Sequence[EditPair], vae: VAE, config: ValidationConfig, seed: int
    ) -> None:
        self.pairs = pairs
        self.config = config
        self.seed = seed
        self.sources = [pair.source_pixels01 for pair in pairs]
        self.targets = [pair.target_pixels01 for pair in pairs]
        self.before = _psnr(self.sources, self.targets)
        self.ceiling = _psnr(round_trip(vae, self.targets), self.targets)

    def __call__(self, editor: Editor) -> Report:
        """Edit and score; the sheet has a row per pair."""
        edits = editor.edit(
            [image_from_pixels01(source) for source in self.sources],
            [pair.instruction for pair in self.pairs],
            **asdict(self.config.edit),
            seeds=[self.seed + index for index in range(len(self.pairs))],
            batch_size=self.config.batch_size,
        ).pixels01
        after = _psnr(edits, self.targets)
        scores = []
        for task in sorted({pair.task for pair in self.pairs}):
            rows = [index for index, pair in enumerate(self.pairs) if pair.task == task]
            means = (values[rows].mean().item() for values in (self.before, after, self.ceiling))
            scores.append(TaskScore(task, len(rows), *means))
        labels = [
            f"{pair.instruction}: {self.before[i]:.1f} dB before, {after[i]:.1f} dB after"
            for i, pair in enumerate(self.pairs)
        ]
        rows = [*zip(self.sources, edits, self.targets, strict=True)]
        return Report(scores, _sheet(rows, ["before", "after", "target"], labels))


def validate_autoencoder(vae: VAE, pairs: Sequence[EditPair]) -> Report:
    """Encode and decode the targets of one task; those of the others are the same pictures."""
    targets = [pair.target_pixels01 for pair in pairs if pair.task == pairs[0].task]
    round_trips = round_trip(vae, targets)
    ceiling = _psnr(round_trips, targets)
    score = TaskScore("round trip", len(targets), None, None, ceiling.mean().item())
    labels = [f"{value:.1f} dB" for value in ceiling.tolist()]
    rows = [*zip(targets, round_trips, strict=True)]
    return Report([score], _sheet(rows, ["picture", "round trip"], labels))


@torch.no_grad()
def round_trip(vae: VAE, pictures: Sequence[Tensor]) -> list[Tensor]:
    """Pictures (3, H, W) in [0, 1], encoded to their most likely latents and decoded."""
    results = []
    for pixels01 in pictures:
        pixels = pixels_from_pixels01(pixels01)[None].to(vae.device, vae.dtype)
        decoded = vae.decode(vae.scale(vae.encode(pixels).mode()))
        results.append(pixels01_from_pixels(decoded[0].float().cpu()))
    return results


def _psnr(pictures: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    return psnr(torch.stack([*pictures]), torch.stack([*targets]))


def _sheet(
    rows: Sequence[Sequence[Tensor]], columns: Sequence[str], labels: Sequence[str]
) -> Image.Image:
    """At most `SHEET_ROWS` of the rows, evenly taken, so that every task is seen."""
    stride = max(1, -(-len(rows) // SHEET_ROWS))
    side = rows[0][0].shape[-1]
    return contact_sheet(
        [[image_from_pixels01(pixels01) for pixels01 in row] for row in rows[::stride]],
        column_labels=columns,
        row_labels=labels[::stride],
        cell=min(256, 4 * side),  # small pictures are enlarged fourfold at most
    )
