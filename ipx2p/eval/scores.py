"""What is measured on an edit, as it was saved, against its source and its target (layer 4).

Measured once and kept as rows, like the edits; a CLIP model that is named later adds its numbers
without editing anything again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
class Shown:
    """N edits of one case, and what they are measured against; all pixels01 (N, 3, H, W).

    clip_*: features of length 1, (N, D).
    """

    edited: Tensor
    source: Tensor
    target: Tensor | None = None
    clip_edited: Tensor | None = None
    clip_source: Tensor | None = None
    clip_captions: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Metric:
    """One number for each edit.

    needs: "", "targets", "clip" or "captions" (of the source and of the target, and CLIP). least:
    the shortest side that it can measure, in pixels.
    """

    label: str
    about: str
    needs: str
    digits: int
    measure: Callable[[Shown], Tensor]
    least: int = 1


METRICS = {
    "change": Metric(
        "change, %",
        "mean absolute difference to the source, in % of the range of values",
        "",
        2,
        lambda shown: 100 * l1(shown.edited, shown.source),
    ),
    "clipped": Metric(
        "clipped, %",
        "values at 0 or 255, in % of all: over-saturation",
        "",
        2,
        lambda shown: (
            100 * ((shown.edited <= 0) | (shown.edited >= 1)).double().mean(dim=(1, 2, 3))
        ),
    ),
    "psnr": Metric(
        "PSNR, dB",
        "against the target; higher is better",
        "targets",
        2,
        lambda shown: psnr(shown.edited, shown.target),
    ),
    "ssim": Metric(
        "SSIM",
        "against the target, at most 1; higher is better",
        "targets",
        4,
        lambda shown: ssim(shown.edited, shown.target),
        least=SSIM_WINDOW,
    ),
    "clip_image": Metric(
        "CLIP image similarity",
        "cosine of the features of edit and source, at most 1; how much of the source is kept",
        "clip",
        4,
        lambda shown: (shown.clip_edited * shown.clip_source).sum(dim=-1).clamp(max=1),
    ),
    "clip_direction": Metric(
        "CLIP direction similarity",
        "cosine of the change of the picture and the change of the captions; 0 for no change",
        "captions",
        4,
        lambda shown: direction_similarity(
            shown.clip_source, shown.clip_edited, *shown.clip_captions
        ),
    ),
}


def pick_metrics(asked: Sequence[str] | None, cases: Sequence[Case], has_clip: bool) -> list[str]:
    """Metrics that can be measured for at least one case, all of them or those asked for.

    Raises: InputError for an unknown one, or one that lacks what it needs.
    """
    lacking = {
        "targets": None if any(case.target for case in cases) else "targets: --manifest, --target",
        "clip": None if has_clip else "a CLIP model: --clip",
        "captions": None
        if has_clip and any(case.captions for case in cases)
        else "a CLIP model and captions: --clip, and source_caption and target_caption in the "
        "manifest or on the command line",
    }
    for name in asked or ():
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}; {suggestion(name, [*METRICS])}")
        if reason := lacking.get(METRICS[name].needs):
            raise InputError(f"metric {name} needs {reason}")
    known = METRICS if asked is None else asked
    return [name for name in METRICS if name in known and not lacking.get(METRICS[name].needs)]


def score_key(edit: str, case: Case, clip: ClipFeatures | None) -> str:
    """Of an edit's scores: they hang on what it is measured against."""
    return key_of([edit, case.target_digest, clip and clip.digest, case.captions])


def identity_key(case: Case, resolution: int | None) -> str:
    """Stands for the edit that changes nothing."""
    return key_of(["identity", case.digest, resolution])


def score_trials(
    trials: Sequence[Trial],
    rows: Rows,
    scores: Rows,
    clip: ClipFeatures | None,
    world: World,
    *,
    resolution: int | None,
    multiple: int,
) -> None:
    """Measure what has no scores yet; cases are shared among the processes."""
    scores.cut_torn_line()
    by_case: dict[Case, list[tuple[str, Path | None]]] = {}
    for trial in trials:
        edits = by_case.setdefault(trial.case, [(identity_key(trial.case, resolution), None)])
        if "failed" not in rows.by_key[trial.key]:
            edits.append((trial.key, rows.folder / trial.file))
    todo = {
        case: [edit for edit in edits if score_key(edit[0], case, clip) not in scores.by_key]
        for case, edits in by_case.items()
    }
    for case, edits in world.share([item for item in todo.items() if item[1]]):
        source = case.load(resolution, multiple)
        for start in range(0, len(edits), BATCH):
            batch = edits[start : start + BATCH]
            pictures = [source if path is None else load_image(path) for _, path in batch]
            shown = _show(pictures, source, case, clip)
            numbers = measure(shown)
            for place, (key, _) in enumerate(batch):
                measured = {name: values[place].item() for name, values in numbers.items()}
                scores.add({"key": score_key(key, case, clip), "edit": key, **measured})


def measure(shown: Shown) -> dict[str, Tensor]:
    """All metrics that what is shown allows, (N,) each."""
    there = {
        "": True,
        "targets": shown.target is not None,
        "clip": shown.clip_source is not None,
        "captions": shown.clip_captions is not None,
    }
    side = min(shown.edited.shape[-2:])
    return {
        name: metric.measure(shown)
        for name, metric in METRICS.items()
        if there[metric.needs] and side >= metric.least
    }


def _show(
    pictures: Sequence[Image.Image], source: Image.Image, case: Case, clip: ClipFeatures | None
) -> Shown:
    def repeated(image: Image.Image) -> Tensor:
        return pixels01_from_image(image).expand(len(pictures), -1, -1, -1)

    edited = torch.stack([pixels01_from_image(picture) for picture in pictures])
    target = repeated(case.load_target(source.size)) if case.target else None
    if clip is None:
        return Shown(edited, repeated(source), target)
    captions = clip.texts(case.captions).split(1) if case.captions else None
    features = (clip.images(edited), clip.images(repeated(source)[:1]), captions)
    return Shown(edited, repeated(source), target, *features)
