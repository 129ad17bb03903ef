"""Validation: fixed held-out pairs, edited and measured against what is possible (layer 4).

A restoration score means little alone: beside the score of the edit stand that of the unedited
input and that of the target after a round trip through the autoencoder, which an edit can hardly
beat. The edits of the averaged weights count; those of the raw ones stand beside them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ipx2p.data.pairs import EditPair, Pairs, centre_geometry
from ipx2p.distributed import World
from ipx2p.editing.editor import Editor
from ipx2p.images import (
    image_from_pixels01,
    pixels01_from_pixels,
    pixels_from_pixels01,
)
from ipx2p.metrics import psnr, ssim
from ipx2p.models.vae import VAE
from ipx2p.seeds import generator
from ipx2p.sheets import contact_sheet
from ipx2p.training.config import ValidationConfig

SHEET_ROWS = 8


METRICS = {"psnr": psnr, "ssim": ssim}


@dataclass(frozen=True)
class TaskScore:
    """Means over the pairs of one task: PSNR in dB, SSIM up to 1.

    Of the unedited input, of the edits by the averaged and by the raw weights, and of the targets
    after a round trip through the autoencoder. An autoencoder has only the last.
    """

    task: str
    pairs: int
    psnr_ceiling: float
    ssim_ceiling: float
    psnr_input: float | None = None
    ssim_input: float | None = None
    psnr_edit: float | None = None
    ssim_edit: float | None = None
    psnr_edit_raw: float | None = None
    ssim_edit_raw: float | None = None


@dataclass(frozen=True)
class Report:
    """What a validation found: a score per task, losses, and a sheet of its pictures."""

    scores: list[TaskScore]
    sheet: Image.Image
    losses: dict[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """The numbers under the names that logs use."""
        scores = {
            f"{name}/{score.task}": value
            for score in self.scores
            for name, value in asdict(score).items()
            if name.startswith(tuple(METRICS)) and value is not None
        }
        return scores | {f"validation_{name}": value for name, value in self.losses.items()}

    def quality(self) -> float:
        """One number, higher is better: mean PSNR over the tasks."""
        values = [s.psnr_ceiling if s.psnr_edit is None else s.psnr_edit for s in self.scores]
        return sum(values) / len(values)


def score_table(scores: Sequence[TaskScore]) -> str:
    """The scores as text, for people: PSNR on held-out pictures in dB."""
    width = max(12, *(len(score.task) + 1 for score in scores))
    lines = [f"{'task':<{width}}{'pairs':>6}{'input dB':>10}{'edit dB':>10}{'VAE ceiling dB':>16}"]
    for score in scores:
        row = (score.psnr_input, score.psnr_edit, score.psnr_ceiling)
        before, after, ceiling = ("-" if value is None else f"{value:.2f}" for value in row)
        lines.append(f"{score.task:<{width}}{score.pairs:>6}{before:>10}{after:>10}{ceiling:>16}")
    return "\n".join(lines)


def fixed_pairs(pairs: Pairs, *, per_task: int, resolution: int, seed: int) -> list[EditPair]:
    """The first pairs of each task, always cut and degraded alike."""
    return [
        pairs.get(
            item,
            lambda size: centre_geometry(size, resolution),
            generator(seed, "validation", item),
        )
        for items in pairs.by_task().values()
        for item in items[:per_task].tolist()
    ]


class EditValidation:
    """Edits the sources of fixed pairs, with the same noise every time, and scores the results.

    The processes of a run share the work; every one of them gets the whole report.

    Args:
        vae: stays the same over a run, and so does the ceiling that it sets.
    """

    def __init__(
        self,
        pairs: Sequence[EditPair],
        vae: VAE,
        config: ValidationConfig,
        seed: int,
        world: World,
    ) -> None:
        self.pairs = pairs
        self.config = config
        self.seed = seed
        self.world = world
        self.sources = [pair.source_pixels01 for pair in pairs]
        self.targets = [pair.target_pixels01 for pair in pairs]
        ceiling = world.merge(round_trip(vae, world.share(self.targets)))
        self.before, self.ceiling = self._measure(self.sources), self._measure(ceiling)

    def __call__(
        self, averaged: Editor, raw: Editor, check: Callable[[], None]
    ) -> tuple[list[TaskScore], Image.Image]:
        """Edit and score; the sheet has a row per pair.

        Args:
            check: called now and then by all processes; it may raise to leave the validation.
        """
        edits = self._edit(averaged, check)
        after, after_raw = self._measure(edits), self._measure(self._edit(raw, check))
        columns = {
            "ceiling": self.ceiling,
            "input": self.before,
            "edit": after,
            "edit_raw": after_raw,
        }
        scores = []
        for task in sorted({pair.task for pair in self.pairs}):
            rows = [index for index, pair in enumerate(self.pairs) if pair.task == task]
            means = {
                f"{metric}_{column}": values[metric][rows].mean().item()
                for column, values in columns.items()
                for metric in METRICS
            }
            scores.append(TaskScore(task, len(rows), **means))
        before_db, after_db = self.before["psnr"].tolist(), after["psnr"].tolist()
        labels = [
            f"{pair.instruction}: {before_db[i]:.1f} dB before, {after_db[i]:.1f} dB after"
            for i, pair in enumerate(self.pairs)
        ]
        rows = [*zip(self.sources, edits, self.targets, strict=True)]
        return scores, _sheet(rows, ["before", "after", "target"], labels)

    def _edit(self, editor: Editor, check: Callable[[], None]) -> list[Tensor]:
        mine = self.world.share(range(len(self.pairs)))
        size = self.config.batch_size
        results: list[Tensor] = []
        most = -(-len(self.pairs) // self.world.size)  # of any process: all must check alike
        for start in range(0, most, size):
            check()
            part = mine[start : start + size]
            if not part:
                break
            results += editor.edit(
                [image_from_pixels01(self.sources[index]) for index in part],
                [self.pairs[index].instruction for index in part],
                **asdict(self.config.edit),
                seeds=[self.seed + index for index in part],
                batch_size=size,
            ).pixels01
        return self.world.merge(results)

    def _measure(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        return _measure(pictures, self.targets)


def validate_autoencoder(vae: VAE, pairs: Sequence[EditPair], world: World) -> Report:
    """Encode and decode the targets of one task; those of the others are the same pictures."""
    targets = [pair.target_pixels01 for pair in pairs if pair.task == pairs[0].task]
    round_trips = world.merge(round_trip(vae, world.share(targets)))
    ceiling = _measure(round_trips, targets)
    means = {f"{metric}_ceiling": values.mean().item() for metric, values in ceiling.items()}
    score = TaskScore("round trip", len(targets), **means)
    labels = [f"{value:.1f} dB" for value in ceiling["psnr"].tolist()]
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


def _measure(pictures: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
    """Each metric of every picture, (N,)."""
    a, b = torch.stack([*pictures]), torch.stack([*targets])
    return {name: metric(a, b) for name, metric in METRICS.items()}


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
