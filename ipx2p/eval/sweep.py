"""A sweep: every combination of guidance, scales, samplers, steps and seeds, edited once (layer 4).

The noise of an edit belongs to its seed, so all combinations of one seed start from the same. An
edit is found by a hash of everything that shapes it, so that a run started again, or with more
scales, computes only what is missing. A scale that a scheme does not use is no part of it.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ipx2p.devices import advice_out_of_memory
from ipx2p.diffusion.guidance.registry import spec_of
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
GUIDANCE_CORE = ("branches", "denoiser", "scheme", "space", "stack")
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
    resolution: int | None = None  # that of the model's training

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
        if not unlike:
            raise InputError("nothing to compare: every option needs at least one value")
        if has_weak and not any(s.make_guidance().needs("weak") for s in unlike.values()):
            raise InputError(
                "a weak network is given, but no --guidance uses one: add autoguidance, or leave "
                "out --weak-weights"
            )
        return [*unlike.values()]


SCALES = {"guidance_scale": "text", "image_guidance_scale": "image"}


def scales_of(settings: EditSettings) -> dict[str, float | None]:
    """Both scales by name; None for one that the guidance does not use."""
    unused = settings.make_guidance().unused_scales
    return {
        name: None if condition in unused else getattr(settings, name)
        for name, condition in SCALES.items()
    }


def described(settings: EditSettings) -> dict[str, Any]:
    """What settings mean, not how they were typed: guidance in full, no scale without effect."""
    guidance = {"guidance": spec_of(settings.make_guidance())}
    return asdict(settings) | guidance | scales_of(settings)


@dataclass(frozen=True)
class Trial:
    """One edit of a sweep. key: a hash of everything that shapes it; cases that only differ in
    their target share an edit."""

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
        weak: stands for the weights of the second network, which shapes the edits that need one.
    """
    trials = []
    for one in settings:
        guidance = one.make_guidance()
        guided = described(one) | {"schemes": schemes_digest(guidance.schemes)}
        if guidance.needs("weak"):
            guided["weak_weights"] = weak
        for case, seed in itertools.product(cases, dict.fromkeys(config.seeds)):
            asked = {"source": case.digest, "instruction": case.instruction, "seed": seed}
            trials.append(Trial(case, one, seed, key_of([asked, guided, made_with])))
    return trials


def weights_digest(folder: Path) -> str:
    """A hash of everything in a weights folder that an edit depends on."""
    paths = sorted(path for part in PARTS for path in (folder / part).glob("*") if path.is_file())
    return key_of([[str(path.relative_to(folder)), digest_file(path)] for path in paths])


def schemes_digest(schemes: Sequence[Scheme]) -> str:
    """A hash of the files that schemes are written in: who changes one compares it anew."""
    files = {Path(inspect.getsourcefile(scheme.make)) for scheme in schemes}
    return key_of([digest_file(path) for path in sorted(files)])


def code_digest() -> str:
    """A hash of the code that every edit runs through, whatever its schemes."""
    package = Path(__file__).parents[1]
    patterns = ("models/*.py", "diffusion/*.py", "editor.py", "edits.py")
    paths = [path for pattern in patterns for path in package.glob(pattern)]
    paths += [package / "diffusion" / "guidance" / f"{name}.py" for name in GUIDANCE_CORE]
    return key_of([digest_file(path) for path in sorted(paths)])


def missing(trials: Sequence[Trial], rows: Rows) -> list[Trial]:
    """Trials without a row, or whose picture is gone or damaged; one for each key."""

    def is_there(trial: Trial) -> bool:
        row, path = rows.by_key.get(trial.key), rows.folder / trial.file
        if row is None or "failed" in row:
            return row is not None
        return path.is_file() and digest_file(path) == row.get("digest")

    return [*{trial.key: trial for trial in trials if not is_there(trial)}.values()]


def part_of(trials: Sequence[Trial], world: World, batch_size: int) -> list[Trial]:
    """What this process takes of them: whole batches, drawn, since some settings cost more."""
    batches = [
        group[start : start + batch_size]
        for group in _groups(trials)
        for start in range(0, len(group), batch_size)
    ]
    drawn = torch.randperm(len(batches), generator=generator(0, "compare shares")).tolist()
    return [trial for number in sorted(world.share(drawn)) for trial in batches[number]]


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
    compiled: bool = False,
) -> None:
    """Edit, and write picture and row of each trial as soon as its batch is done.

    Where numbers stop being finite, as extreme scales make them, the row says so, and the sweep
    goes on.

    Args:
        trials: this process's part. compiled: for the record, the networks are what they are.
    """
    rows.cut_torn_line()
    how = surroundings(editor) | {
        "batch_size": batch_size,
        "batch_branches": batch_branches,
        "compiled": compiled,
    }
    with tqdm(total=len(trials), unit="edit", disable=not world.is_main) as bar:

        def write(trial: Trial, edited: Edited | NotFiniteError) -> None:
            _write(trial, edited, rows, how)
            bar.update()

        for batch in _batches(trials):
            with advice_out_of_memory(
                lambda: (
                    f"{len(rows.by_key)} edits are written and stay; try a smaller "
                    "--batch-size, or --one-branch-at-a-time"
                )
            ):
                _edit(batch, config, editor, weak, write, batch_size, batch_branches)


def _edit(
    batch: Sequence[Trial],
    config: SweepConfig,
    editor: Editor,
    weak: UNet | None,
    write: Callable[[Trial, Edited | NotFiniteError], None],
    batch_size: int,
    batch_branches: bool,
) -> None:
    """Edit trials of the same settings; those beside one that fails are done by themselves."""
    settings = batch[0].settings
    needs_weak = bool(settings.make_guidance().needs("weak"))
    done = set()

    def on_edit(index: int, edited: Edited) -> None:
        done.add(index)
        write(batch[index], edited)

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
            on_edit=on_edit,
        )
    except NotFiniteError as error:
        left = [trial for index, trial in enumerate(batch) if index not in done]
        if len(left) == 1:
            write(left[0], error)
            return
        for trial in left:
            _edit([trial], config, editor, weak, write, batch_size, batch_branches)


def _groups(trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    """Runs of trials with the same settings."""
    for _, group in itertools.groupby(trials, key=lambda trial: described(trial.settings)):
        yield [*group]


def _batches(trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    """Runs of trials with the same settings, as many as are held in memory."""
    for group in _groups(trials):
        for start in range(0, len(group), MAX_LOADED):
            yield group[start : start + MAX_LOADED]


def _load(batch: Sequence[Trial], resolution: int | None, multiple: int) -> list:
    """Sources at the size of the edits; one picture that is edited several times is shared."""
    loaded: dict[str, Any] = {}
    for trial in batch:
        if trial.case.digest not in loaded:
            loaded[trial.case.digest] = trial.case.load(resolution, multiple)
    return [loaded[trial.case.digest] for trial in batch]


def _write(trial: Trial, edited: Edited | NotFiniteError, rows: Rows, how: dict[str, Any]) -> None:
    """The picture first: a row stands for a picture that is there, or for one that cannot be."""
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
