"""A sweep: every combination of guidance, scales, samplers, steps and seeds, edited once (layer 4).

The noise of an edit depends on its seed alone, so all combinations of a seed start from the same
noise. The key of an edit is a hash of everything that shapes it: a sweep that is run again, or with
more scales, computes only what is missing, and schemes that agree at some scales share their edits.
"""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ipx2p.devices import advice_out_of_memory
from ipx2p.diffusion.guidance.registry import SCHEMES
from ipx2p.diffusion.guidance.scheme import Scheme
from ipx2p.distributed import World
from ipx2p.editing.editor import Editor
from ipx2p.editing.files import surroundings
from ipx2p.editing.settings import Edited, EditSettings, check_needs
from ipx2p.errors import InputError, NotFiniteError
from ipx2p.eval.cases import Case
from ipx2p.eval.rows import Rows, key_of
from ipx2p.files import digest_file
from ipx2p.images import save_image
from ipx2p.models.unet import UNet
from ipx2p.seeds import generator

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# What every edit runs through, besides the files of its schemes.
CODE = ("models/*.py", "diffusion/**/*.py", "editing/editor.py", "editing/settings.py")
MAX_LOADED = 64  # pictures held in memory


@dataclass
class SweepConfig:
    """What is combined with what; the names are those of `EditSettings`, with several values.

    compile: for the record; the networks are already compiled.
    """

    guidance: list[str] = field(default_factory=lambda: ["ip2p"])
    guidance_scale: list[float] = field(default_factory=lambda: [7.0])
    image_guidance_scale: list[float] = field(default_factory=lambda: [1.5])
    sampler: list[str] = field(default_factory=lambda: ["euler_ancestral"])
    spacing: str = "linspace"
    num_steps: list[int] = field(default_factory=lambda: [20])
    seeds: list[int] = field(default_factory=lambda: [0])
    negative_instruction: str = ""
    resolution: int | None = None  # that of the model's training
    batch_size: int = 4
    batch_branches: bool = True
    compile: bool = False

    def settings(self, *, has_weak: bool) -> list[EditSettings]:
        """Every combination, each once; InputError for one that cannot be edited with."""
        names = ("guidance", "sampler", "num_steps", "image_guidance_scale", "guidance_scale")
        unlike: dict[str, EditSettings] = {}
        for values in itertools.product(*(getattr(self, name) for name in names)):
            settings = EditSettings(spacing=self.spacing, **dict(zip(names, values, strict=True)))
            settings.check()
            needs_weak = bool(settings.spec.needs("weak"))
            check_needs(settings, [self.negative_instruction], has_weak and needs_weak)
            unlike.setdefault(key_of(described(settings)), settings)
        if not unlike:
            raise InputError("nothing to compare: every option needs at least one value")
        if has_weak and not any(s.spec.needs("weak") for s in unlike.values()):
            raise InputError(
                "a weak network is given, but no --guidance uses one: add autoguidance, or leave "
                "out --weak-weights"
            )
        return [*unlike.values()]


SCALES = {"guidance_scale": "text", "image_guidance_scale": "image"}


def scales_of(settings: EditSettings) -> dict[str, float | None]:
    """Both scales by name; None for one that the guidance does not use."""
    unused = settings.spec.unused_scales
    return {
        name: None if condition in unused else getattr(settings, name)
        for name, condition in SCALES.items()
    }


def described(settings: EditSettings) -> dict[str, Any]:
    """What settings mean, however they were typed: guidance in full, no scale without effect."""
    guidance = {"guidance": str(settings.spec)}
    return asdict(settings) | guidance | scales_of(settings)


@dataclass(frozen=True)
class Trial:
    """One edit of a sweep.

    key: a hash of everything that shapes it. Trials with the same key share the edit: guidance that
    is the same at some scales, and cases that differ only in their target.
    """

    case: Case
    settings: EditSettings
    seed: int
    key: str

    @property
    def file(self) -> str:
        """Where its picture is, in the output folder."""
        return f"edits/{self.key}.png"


def make_trials(
    cases: Sequence[Case],
    config: SweepConfig,
    settings: Sequence[EditSettings],
    made_with: dict,
    weak: str | None = None,
) -> list[Trial]:
    """Every case with all settings and seeds.

    Args:
        made_with: what else shapes every edit: weights, resolution, precision.
        weak: digest of the second network's weights, which shapes the edits that need one.
    """
    trials = []
    for one in settings:
        schemes = [one.spec.base, *(modifier.scheme for modifier in one.spec.acting)]
        digests = [digest_file(path) for path in files_of(schemes)]
        guided = [one.sampler, one.spacing, one.num_steps, one.spec.canonical, digests]
        if one.spec.needs("weak"):
            guided.append(weak)
        for case, seed in itertools.product(cases, dict.fromkeys(config.seeds)):
            asked = {"source": case.digest, "instruction": case.instruction, "seed": seed}
            key = key_of([asked, guided, made_with])
            trials.append(Trial(case, one, seed, key))
    return trials


def weights_digest(folder: Path) -> str:
    """A hash of everything in a weights folder that an edit depends on."""
    paths = sorted(path for part in PARTS for path in (folder / part).glob("*") if path.is_file())
    return key_of([[str(path.relative_to(folder)), digest_file(path)] for path in paths])


def code_digest() -> str:
    """A hash of the code that every edit runs through, with any scheme."""
    return key_of([digest_file(path) for path in code_files()])


def code_files() -> list[Path]:
    """The files of that code; those of the report are not among them."""
    package = Path(__file__).parents[1]
    paths = {path for pattern in CODE for path in package.glob(pattern)}
    return sorted(paths - {*files_of(SCHEMES.values())})


def files_of(schemes: Iterable[Scheme]) -> list[Path]:
    """The files of schemes: an edit is redone if one of its schemes has changed."""
    return sorted({Path(inspect.getsourcefile(scheme.make)) for scheme in schemes})


def missing(trials: Sequence[Trial], rows: Rows) -> list[Trial]:
    """Trials without a row, or with a missing or damaged picture; the first of each key."""

    def is_done(trial: Trial) -> bool:
        row, path = rows.by_key.get(trial.key), rows.folder / trial.file
        if row is None or "failed" in row:
            return row is not None
        return path.is_file() and digest_file(path) == row.get("digest")

    first: dict[str, Trial] = {}
    for trial in trials:
        first.setdefault(trial.key, trial)
    return [trial for trial in first.values() if not is_done(trial)]


def part_of(trials: Sequence[Trial], world: World, batch_size: int) -> list[Trial]:
    """This process's share: whole batches, drawn at random since some settings cost more."""
    batches = [*_batches(trials, batch_size)]
    drawn = torch.randperm(len(batches), generator=generator(0, "compare shares")).tolist()
    return [trial for number in sorted(world.share(drawn)) for trial in batches[number]]


def run_trials(
    trials: Sequence[Trial],
    rows: Rows,
    config: SweepConfig,
    editor: Editor,
    weak: UNet | None,
    world: World,
) -> None:
    """Edit, and write picture and row of each trial as soon as its batch is done.

    An edit that is not finite, as at extreme scales, is recorded as such, and the sweep continues.

    Args:
        trials: this process's part.
    """
    batching = {"batch_size": config.batch_size, "batch_branches": config.batch_branches}
    how = surroundings(editor) | batching | {"compiled": config.compile}

    def edit(batch: Sequence[Trial]) -> None:
        """Edit trials of the same settings; if one fails, those left are edited one by one."""
        settings = batch[0].settings
        cases = {trial.case.digest: trial.case for trial in batch}
        multiple = editor.vae.config.downscale
        images = {key: case.load(config.resolution, multiple) for key, case in cases.items()}
        done = set()

        def on_edit(index: int, edited: Edited | NotFiniteError) -> None:
            done.add(index)
            _write(batch[index], edited, rows, how)
            bar.update()

        try:
            editor.edit(
                [images[trial.case.digest] for trial in batch],
                [trial.case.instruction for trial in batch],
                **asdict(settings),
                seeds=[trial.seed for trial in batch],
                negative_instructions=config.negative_instruction,
                weak=weak if settings.spec.needs("weak") else None,
                **batching,
                on_edit=on_edit,
            )
        except NotFiniteError as error:
            if len(batch) == 1:
                on_edit(0, error)
            else:
                for index in sorted({*range(len(batch))} - done):
                    edit([batch[index]])

    advice = "edits are written and kept; try a smaller --batch-size, or --one-branch-at-a-time"
    with (
        advice_out_of_memory(lambda: f"{len(rows.by_key)} {advice}"),
        tqdm(total=len(trials), unit="edit", disable=not world.is_main) as bar,
    ):
        for batch in _batches(trials, MAX_LOADED):
            edit(batch)


def _batches(trials: Sequence[Trial], size: int) -> Iterator[list[Trial]]:
    """Runs of at most `size` trials with the same settings."""
    for _, group in itertools.groupby(trials, key=lambda trial: described(trial.settings)):
        same = [*group]
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _write(trial: Trial, edited: Edited | NotFiniteError, rows: Rows, how: dict[str, Any]) -> None:
    """Write the picture, then the row: a row means that its picture exists, or that none can."""
    if isinstance(edited, NotFiniteError):
        gave = {"failed": str(edited)}
    else:
        save_image(edited.image, rows.folder / trial.file)
        gave = {
            "file": trial.file,
            "digest": digest_file(rows.folder / trial.file),
            "width": edited.image.width,
            "height": edited.image.height,
            "evaluations": edited.evaluations,
            "seconds": round(edited.seconds, 4),
        }
    rows.add(
        {
            "key": trial.key,
            "source": str(trial.case.source),
            "instruction": trial.case.instruction,
            "task": trial.case.task,
            "seed": trial.seed,
            **asdict(trial.settings),
            "guidance_in_full": described(trial.settings)["guidance"],
            **gave,
            **how,
        }
    )
