"""Metrics of saved edits, against their source and target (layer 4).

Scores are measured once and kept as rows, like the edits: a CLIP model that is given later adds its
numbers without editing again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ipx2p.distributed import World
from ipx2p.errors import InputError, suggestion
from ipx2p.eval.cases import Case
from ipx2p.eval.features import ClipFeatures, direction_similarity
from ipx2p.eval.rows import Rows, key_of
from ipx2p.eval.sweep import Trial
from ipx2p.images import load_image, pixels01_from_image
from ipx2p.metrics import SSIM_WINDOW, l1, psnr, ssim

BATCH = 16  # pictures measured at once


@dataclass(frozen=True)
class Metric:
    """One number for each edit.

    needs: "source", "target", "clip" (features of source and edit) or "captions" (features of
    source, edit, and both captions). measure: (edits, what it needs) -> (N,), pictures as pixels01,
    (N, 3, H, W). chooses: the best scales are those at which it is highest. least: the shortest
    side that it can measure, in pixels.
    """

    label: str
    about: str
    needs: str
    digits: int
    measure: Callable[[Tensor, Any], Tensor]
    chooses: bool = False
    least: int = 1


def _clipped(edited: Tensor, source: Tensor) -> Tensor:
    return 100 * ((edited <= 0) | (edited >= 1)).double().mean(dim=(1, 2, 3))


METRICS = {
    "change": Metric(
        "change, %",
        "mean absolute difference from the source, in % of the range of values",
        *("source", 2, lambda edited, source: 100 * l1(edited, source)),
    ),
    "clipped": Metric(
        "clipped, %", "values at 0 or 255, in % of all: over-saturation", "source", 2, _clipped
    ),
    "psnr": Metric(
        "PSNR, dB", "against the target; higher is better", "target", 2, psnr, chooses=True
    ),
    "ssim": Metric(
        *("SSIM", "against the target, at most 1; higher is better", "target", 4, ssim),
        chooses=True,
        least=SSIM_WINDOW,
    ),
    "clip_image": Metric(
        "CLIP image similarity",
        "cosine of the features of edit and source, at most 1; how much of the source is kept",
        *("clip", 4, lambda _, features: (features[0] * features[1]).sum(dim=-1).clamp(max=1)),
    ),
    "clip_direction": Metric(
        "CLIP direction similarity",
        "cosine between the change of the picture and that of the captions; 0 for no change",
        *("captions", 4, lambda _, features: direction_similarity(*features)),
    ),
}


def lacking(cases: Iterable[Case], has_clip: bool) -> dict[str, str]:
    """What metrics need and these cases do not have, and how to give it."""
    missing = {} if has_clip else {"clip": "a CLIP model (--clip)"}
    if not any(case.target for case in cases):
        missing["target"] = "targets (--manifest, --target)"
    if not has_clip or not any(case.captions for case in cases):
        missing["captions"] = (
            "a CLIP model and captions (--clip, and source_caption and target_caption in the "
            "manifest or on the command line)"
        )
    return missing


def pick_metrics(asked: Sequence[str] | None, cases: Sequence[Case], has_clip: bool) -> list[str]:
    """Metrics that can be measured for at least one case: all of them, or those asked for.

    Raises: InputError for an unknown one, or one that lacks what it needs.
    """
    missing = lacking(cases, has_clip)
    for name in asked or ():
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}; {suggestion(name, [*METRICS])}")
        if reason := missing.get(METRICS[name].needs):
            raise InputError(f"metric {name} needs {reason}")
    known = METRICS if asked is None else asked
    return [name for name in METRICS if name in known and METRICS[name].needs not in missing]


def score_key(edit: str, case: Case, clip: ClipFeatures | None) -> str:
    """Of an edit's scores, which depend on what it is measured against, and by what."""
    return key_of([edit, case.target_digest, clip and clip.digest, case.captions, [*METRICS]])


def identity_key(case: Case, resolution: int | None) -> str:
    """Of the edit that changes nothing."""
    return key_of(["identity", case.digest, resolution])


@dataclass
class Results:
    """The trials of a sweep, what was recorded of them, and what was measured.

    multiple: sides of edits are multiples of it, in pixels.
    """

    trials: Sequence[Trial]
    rows: Rows
    scores: Rows
    clip: ClipFeatures | None
    resolution: int | None
    multiple: int

    def row(self, trial: Trial) -> dict[str, Any]:
        """How it was edited, and what that cost."""
        return self.rows.by_key[trial.key]

    def score(self, trial: Trial) -> dict[str, float]:
        """By metric; empty for an edit that is not finite."""
        if "failed" in self.row(trial):
            return {}
        return self.scores.by_key[score_key(trial.key, trial.case, self.clip)]

    def identity(self, case: Case) -> dict[str, float]:
        """The scores of the unchanged source."""
        edit = identity_key(case, self.resolution)
        return self.scores.by_key[score_key(edit, case, self.clip)]

    def measure(self, world: World) -> None:
        """Measure what has no scores yet; cases are shared among the processes."""
        todo: dict[Case, dict[str, Path | None]] = {}
        for trial in self.trials:
            edits = {identity_key(trial.case, self.resolution): None}
            if "failed" not in self.row(trial):
                edits[trial.key] = self.rows.folder / trial.file
            for edit, path in edits.items():
                key = score_key(edit, trial.case, self.clip)
                if key not in self.scores.by_key:
                    todo.setdefault(trial.case, {})[key] = path
        for case, edits in world.share([*todo.items()]):
            source = case.load(self.resolution, self.multiple)
            for start in range(0, len(edits), BATCH):
                keys = [*edits][start : start + BATCH]
                pictures = [load_image(edits[key]) if edits[key] else source for key in keys]
                numbers = _measure_case(pictures, source, case, self.clip)
                for place, key in enumerate(keys):
                    measured = {name: values[place].item() for name, values in numbers.items()}
                    self.scores.add({"key": key, **measured})


def measure(edited: Tensor, **against: Any) -> dict[str, Tensor]:
    """Every metric whose need is among `against`, (N,) each; edited: pixels01, (N, 3, H, W)."""
    side = min(edited.shape[-2:])
    return {
        name: metric.measure(edited, against[metric.needs])
        for name, metric in METRICS.items()
        if metric.needs in against and side >= metric.least
    }


def _measure_case(
    pictures: Sequence[Image.Image], source: Image.Image, case: Case, clip: ClipFeatures | None
) -> dict[str, Tensor]:
    edited = torch.stack([pixels01_from_image(picture) for picture in pictures])
    against = {"source": pixels01_from_image(source).expand_as(edited)}
    if case.target:
        target = case.load_target(source.size)
        against["target"] = pixels01_from_image(target).expand_as(edited)
    if clip is not None:
        features = (clip.images(against["source"][:1]), clip.images(edited))
        against["clip"] = features
        if case.captions:
            against["captions"] = (*features, *clip.texts(case.captions).split(1))
    return measure(edited, **against)
