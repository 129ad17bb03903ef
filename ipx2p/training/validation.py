"""Validation: fixed held-out pairs, edited and measured against the best possible (layer 4).

A restoration score means little alone, so it comes with those of the unedited input and of the
target after a round trip through the autoencoder, which an edit can hardly beat. Edits with the
averaged weights decide; edits with the raw weights, and without guidance, are scored as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ipx2p.data.pairs import EditPair, Pairs, centre_geometry
from ipx2p.distributed import World
from ipx2p.editing.editor import Editor
from ipx2p.editing.settings import EditSettings
from ipx2p.fidelity import PLAIN
from ipx2p.images import image_from_pixels01, pixels01_from_pixels, pixels_from_pixels01
from ipx2p.metrics import METRICS
from ipx2p.models.vae import VAE
from ipx2p.seeds import generator
from ipx2p.sheets import contact_sheet
from ipx2p.training.config import ValidationConfig

SHEET_ROWS = 8
MAIN = "psnr"  # the metric of the best checkpoint and of the table
TITLES = {
    "input": "input",
    "edit_unguided": "unguided",
    "edit_plain": "plain",
    "edit": "edit",
    "ceiling": "VAE ceiling",
}
OPTIONAL = {  # columns of edits with other settings, where these are not the same
    "edit_unguided": {"guidance": "ip2p", "guidance_scale": 1.0, "image_guidance_scale": 1.0},
    "edit_plain": {"fidelity": PLAIN},
}


@dataclass(frozen=True)
class Report:
    """The result of a validation: a score per task, losses, and a sheet of its pictures.

    A score has `task`, the number of its `pairs`, and their means as METRIC_COLUMN. METRIC is one
    of `METRICS`. COLUMN is `input` for the unedited input; `edit` and `edit_raw` for edits with the
    averaged and the raw weights; `edit_unguided` and `edit_plain` for the averaged ones without
    guidance and without fidelity, if the settings have some; `ceiling` for the targets after a
    round trip through the autoencoder, the only one for an autoencoder.
    """

    scores: list[dict[str, Any]]
    sheet: Image.Image
    losses: dict[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """The numbers under the names that logs use."""
        scores = {
            f"{name}/{score['task']}": mean
            for score in self.scores
            for name, mean in score.items()
            if name not in ("task", "pairs")
        }
        return scores | {f"validation_{name}": value for name, value in self.losses.items()}

    def quality(self) -> float:
        """One number for the best checkpoint: the mean of the main metric over the tasks."""
        values = [s.get(f"{MAIN}_edit", s[f"{MAIN}_ceiling"]) for s in self.scores]
        return sum(values) / len(values)


def score_table(scores: Sequence[dict[str, Any]]) -> str:
    """The scores as text: the main metric on held-out pictures, and which tasks got worse."""
    metric = METRICS[MAIN]
    rows = [{column: score.get(f"{MAIN}_{column}") for column in TITLES} for score in scores]
    titles = {column: f"{title} {metric.unit}" for column, title in TITLES.items()}
    for column in OPTIONAL:
        if all(row[column] is None for row in rows):
            del titles[column]
    width = max(12, *(len(score["task"]) + 1 for score in scores))
    lines = [f"{'task':<{width}}{'pairs':>6}"]
    lines += [f"{score['task']:<{width}}{score['pairs']:>6}" for score in scores]
    for column, title in titles.items():
        values = [row[column] for row in rows]
        texts = ["-" if value is None else f"{value:.{metric.digits}f}" for value in values]
        for place, text in enumerate([title, *texts]):
            lines[place] += f"{text:>{max(10, 2 + len(title))}}"
    for score, row in zip(scores, rows, strict=True):
        if row["edit"] is not None and metric.is_worse(row["edit"], row["input"]):
            lines.append(f"{score['task']}: edits are further from their targets than the input is")
    return "\n".join(lines)


def fixed_pairs(pairs: Pairs, *, per_task: int, resolution: int, seed: int) -> list[EditPair]:
    """The first pairs of each task, always with the same crop and degradation."""
    cut = partial(centre_geometry, resolution=resolution)
    chosen = [item for items in pairs.by_task().values() for item in items[:per_task].tolist()]
    return [pairs.get(item, cut, generator(seed, "validation", item)) for item in chosen]


class EditValidation:
    """Edits the sources of fixed pairs, with the same noise every time, and scores the results.

    The processes of a run share the work; each of them gets the whole report.

    Args:
        vae: frozen, so the ceiling that it sets is the same over a run.
    """

    def __init__(
        self, pairs: Sequence[EditPair], vae: VAE, config: ValidationConfig, seed: int, world: World
    ) -> None:
        self.pairs = pairs
        self.config = config
        self.seed = seed
        self.world = world
        self.sources = [pair.source_pixels01 for pair in pairs]
        self.targets = [pair.target_pixels01 for pair in pairs]
        ceiling = world.merge(round_trip(vae, world.share(self.targets)))
        self.before = _measure(self.sources, self.targets)
        self.ceiling = _measure(ceiling, self.targets)

    def __call__(
        self, averaged: Editor, raw: Editor, check: Callable[[], None]
    ) -> tuple[list[dict[str, Any]], Image.Image]:
        """Edit and score; the sheet has a row per pair.

        Args:
            check: called now and then by all processes; it may raise to abandon the validation.
        """
        guided = self.config.edit
        edits = self._edit(averaged, guided, check)
        columns = {
            "ceiling": self.ceiling,
            "input": self.before,
            "edit": _measure(edits, self.targets),
            "edit_raw": _measure(self._edit(raw, guided, check), self.targets),
        }
        for column, changes in OPTIONAL.items():
            if (settings := replace(guided, **changes)) != guided:
                others = self._edit(averaged, settings, check)
                columns[column] = _measure(others, self.targets)
        scores = []
        for task in sorted({pair.task for pair in self.pairs}):
            rows = [index for index, pair in enumerate(self.pairs) if pair.task == task]
            means = {
                f"{metric}_{column}": values[metric][rows].mean().item()
                for column, values in columns.items()
                for metric in METRICS
            }
            scores.append({"task": task, "pairs": len(rows), **means})
        before_db, after_db = (columns[name]["psnr"].tolist() for name in ("input", "edit"))
        labels = [
            f"{pair.instruction}: {before_db[i]:.1f} dB before, {after_db[i]:.1f} dB after"
            for i, pair in enumerate(self.pairs)
        ]
        rows = [*zip(self.sources, edits, self.targets, strict=True)]
        return scores, _sheet(rows, ["before", "after", "target"], labels)

    def _edit(
        self, editor: Editor, settings: EditSettings, check: Callable[[], None]
    ) -> list[Tensor]:
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
                **asdict(settings),
                seeds=[self.seed + index for index in part],
                batch_size=size,
            ).pixels01
        return self.world.merge(results)


def validate_autoencoder(vae: VAE, pairs: Sequence[EditPair], world: World) -> Report:
    """Encode and decode the targets of one task; those of the others are the same pictures."""
    targets = [pair.target_pixels01 for pair in pairs if pair.task == pairs[0].task]
    round_trips = world.merge(round_trip(vae, world.share(targets)))
    ceiling = _measure(round_trips, targets)
    means = {f"{metric}_ceiling": values.mean().item() for metric, values in ceiling.items()}
    score = {"task": "round trip", "pairs": len(targets), **means}
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
    return {name: metric.measure(a, b) for name, metric in METRICS.items()}


def _sheet(
    rows: Sequence[Sequence[Tensor]], columns: Sequence[str], labels: Sequence[str]
) -> Image.Image:
    """At most `SHEET_ROWS` of the rows, evenly spaced, so that every task is shown."""
    stride = max(1, -(-len(rows) // SHEET_ROWS))
    side = rows[0][0].shape[-1]
    return contact_sheet(
        [[image_from_pixels01(pixels01) for pixels01 in row] for row in rows[::stride]],
        column_labels=columns,
        row_labels=labels[::stride],
        cell=min(256, 4 * side),  # small pictures are enlarged fourfold at most
    )
