"""A sweep: every combination of guidance, scales, samplers, steps and seeds, edited once (layer 4).

The noise of an edit belongs to its seed, so all combinations of one seed start from the same. An
edit is found by a hash of everything that shapes it, so that a run started again, or with more
scales, computes only what is missing.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ipx2p.diffusion.guidance.registry import spec_of
from ipx2p.distributed import World
from ipx2p.edit_files import surroundings
from ipx2p.editor import Editor
from ipx2p.edits import Edited, EditSettings, check_needs
from ipx2p.errors import InputError
from ipx2p.eval.cases import Case, file_digest
from ipx2p.eval.rows import Rows, key_of
from ipx2p.images import save_image
from ipx2p.models.unet import UNet

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
MAX_LOADED = 64  # pictures held in memory


@dataclass
class SweepConfig:
    """What is combined with what; the names are those of `EditSettings`, with several values."""

    guidance: list[str] = field(default_factory=lambda: ["ip2p"])
    guidance_scale: list[float] = field(default_factory=lambda: [7.0])
    image_guidance_scale: list[float] = field(default_factory=lambda: [1.5])
    sampler: list[str] = field(default_factory=lambda: ["euler_ancestral"])
    spacing: str = "linspace"
    steps: list[int] = field(default_factory=lambda: [20])
    seeds: list[int] = field(default_factory=lambda: [0])
    negative_instruction: str = ""
    resolution: int | None = 512

    def settings(self, *, has_weak: bool) -> list[EditSettings]:
        """Every combination, each once; InputError for one that cannot be edited with."""
        product = itertools.product(
            self.guidance, self.sampler, self.steps, self.image_guidance_scale, self.guidance_scale
        )
        unlike: dict[str, EditSettings] = {}
        for guidance, sampler, steps, image_scale, scale in product:
            settings = EditSettings(sampler, self.spacing, steps, guidance, scale, image_scale)
            settings.check()
            needs_weak = bool(settings.make_guidance().needs("weak"))
            check_needs(settings, [self.negative_instruction], has_weak and needs_weak)
            unlike.setdefault(key_of(described(settings)), settings)
        if has_weak and not any(s.make_guidance().needs("weak") for s in unlike.values()):
            raise InputError(
                "a weak network is given, but no --guidance uses one: add autoguidance, or leave "
                "out --weak-weights"
            )
        if self.resolution is not None and self.resolution < 1:
            raise InputError(f"resolution is {self.resolution}, expected 1 or more pixels")
        return [*unlike.values()]


def described(settings: EditSettings) -> dict[str, Any]:
    """Settings with their guidance written out in full: what it means, not how it was typed."""
    return asdict(settings) | {"guidance": spec_of(settings.make_guidance())}


@dataclass(frozen=True)
class Trial:
    """One edit of a sweep. key: a hash of everything that shapes it."""

    case: Case
    settings: EditSettings
    seed: int
    key: str

    @property
    def file(self) -> str:
        """Where its picture is, in the output folder."""
        return f"edits/{self.key}.png"


def make_trials(
    cases: Sequence[Case], config: SweepConfig, settings: Sequence[EditSettings], made_with: dict
) -> list[Trial]:
    """Every case with all settings and seeds, each once.

    Args:
        made_with: what else shapes every edit: weights, resolution, precision.
    """
    trials: dict[str, Trial] = {}
    for one in settings:
        guided = described(one)
        for case, seed in itertools.product(cases, config.seeds):
            asked = {"source": case.digest, "instruction": case.instruction, "seed": seed}
            key = key_of([asked, guided, made_with])
            trials.setdefault(key, Trial(case, one, seed, key))
    return [*trials.values()]


def weights_digest(folder: Path) -> str:
    """A hash of everything in a weights folder that an edit depends on."""
    paths = sorted(path for part in PARTS for path in (folder / part).glob("*") if path.is_file())
    return key_of([[str(path.relative_to(folder)), file_digest(path)] for path in paths])


def missing(trials: Sequence[Trial], rows: Rows) -> list[Trial]:
    """Trials without a row, or whose picture is gone."""
    return [t for t in trials if t.key not in rows.by_key or not (rows.folder / t.file).exists()]


def run_trials(
    trials: Sequence[Trial],
    rows: Rows,
    config: SweepConfig,
    editor: Editor,
    weak: UNet | None,
    world: World,
    *,
    batch_size: int,
    batch_branches: bool,
) -> None:
    """Edit, and write picture and row of each trial as soon as its batch is done.

    Args:
        trials: this process's part.
    """
    rows.cut_torn_line()
    with tqdm(total=len(trials), unit="edit", disable=not world.is_main) as bar:
        for batch in _batches(trials):
            settings = batch[0].settings
            needs_weak = bool(settings.make_guidance().needs("weak"))

            def write(index: int, edited: Edited, batch: Sequence[Trial] = batch) -> None:
                _write(batch[index], edited, rows, surroundings(editor) | {"batch": batch_size})
                bar.update()

            try:
                editor.edit(
                    _load(batch, config.resolution, editor.vae.config.downscale),
                    [trial.case.instruction for trial in batch],
                    **asdict(settings),
                    seeds=[trial.seed for trial in batch],
                    negative_instructions=[config.negative_instruction] * len(batch),
                    weak=weak if needs_weak else None,
                    batch_size=batch_size,
                    batch_branches=batch_branches,
                    on_edit=write,
                )
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"out of memory on {editor.device}; {len(rows.by_key)} edits are written and "
                    "stay: try a smaller --batch-size, or --one-branch-at-a-time"
                ) from error
            except InputError as error:
                raise InputError(
                    f"{settings.guidance} at {settings.guidance_scale:g}, "
                    f"{settings.image_guidance_scale:g}: {error}"
                ) from error


def _batches(trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    """Runs of trials with the same settings."""
    for _, group in itertools.groupby(trials, key=lambda trial: described(trial.settings)):
        group = [*group]
        for start in range(0, len(group), MAX_LOADED):
            yield group[start : start + MAX_LOADED]


def _load(batch: Sequence[Trial], resolution: int | None, multiple: int) -> list:
    """Sources at the size of the edits; one picture that is edited several times is shared."""
    loaded: dict[str, Any] = {}
    for trial in batch:
        if trial.case.digest not in loaded:
            loaded[trial.case.digest] = trial.case.load(resolution, multiple)
    return [loaded[trial.case.digest] for trial in batch]


def _write(trial: Trial, edited: Edited, rows: Rows, made_on: dict[str, Any]) -> None:
    """The picture first: a row stands for a picture that is there."""
    save_image(edited.image, rows.folder / trial.file)
    size = {"width": edited.image.width, "height": edited.image.height}
    cost = {"evaluations": edited.evaluations, "seconds": round(edited.seconds, 4)}
    rows.add(
        {
            "key": trial.key,
            "source": str(trial.case.source),
            "instruction": trial.case.instruction,
            "task": trial.case.task,
            "seed": trial.seed,
            **asdict(trial.settings),
            "guidance_in_full": described(trial.settings)["guidance"],
            "file": trial.file,
            **size,
            **cost,
            **made_on,
        }
    )
