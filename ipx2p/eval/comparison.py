"""Compare guidance: edit every combination, measure, and report (layer 4).

OUTPUT/  edits/KEY.png  edits_RANK.jsonl  scores_RANK.jsonl  sweep.json      what was computed
         index.html  table.md  table.csv  edits.csv  grids/  curves/         the report
"""

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ipx2p import __version__
from ipx2p.devices import dtype_name, pick_device, pick_dtype
from ipx2p.diffusion.schedule import Schedule, ScheduleConfig
from ipx2p.distributed import World, open_world
from ipx2p.editing.editor import Editor
from ipx2p.editing.settings import EditSettings, pick_resolution
from ipx2p.errors import InputError
from ipx2p.eval.cases import Case, draw
from ipx2p.eval.features import ClipFeatures
from ipx2p.eval.grids import make_grids
from ipx2p.eval.report import make_notes, write_report
from ipx2p.eval.rows import Rows, key_of
from ipx2p.eval.scores import pick_metrics, score_trials
from ipx2p.eval.sweep import (
    SweepConfig,
    Trial,
    code_digest,
    make_trials,
    missing,
    part_of,
    run_trials,
    weights_digest,
)
from ipx2p.eval.tables import check_complete, computed_on, csv_of_edits, make_lines
from ipx2p.files import check_writable, hold_lock, read_json, write_json
from ipx2p.models.unet import UNet, UNetConfig
from ipx2p.models.vae import VAEConfig
from ipx2p.weights.readers import find_folder

SWEEP = "sweep.json"
TIMEOUT = timedelta(days=7)  # processes that are done wait for those that are not


@dataclass
class CompareConfig:
    """Where a comparison computes and what it reports.

    clip: folder or hub id of a CLIP model. metrics: None is all that can be measured. grids: how
    many pictures get sheets.
    """

    output: Path = Path("compare")
    sweep: SweepConfig = field(default_factory=SweepConfig)
    weak_weights: str | None = None
    clip: str | None = None
    metrics: list[str] | None = None
    grids: int = 4
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 4
    batch_branches: bool = True
    compile: bool = False
    command: str = ""


def compare(weights: str, cases: Sequence[Case], config: CompareConfig) -> None:
    """Run a sweep over the cases and write its report; what is there already is not computed again.

    Several processes of `torchrun` share the edits.

    Raises: InputError for bad arguments or files, before the weights are loaded where possible.
    """
    settings = config.sweep.settings(has_weak=config.weak_weights is not None)
    folder = find_folder(weights)
    resolution, notes = pick_resolution(folder, config.sweep.resolution)
    config = replace(config, sweep=replace(config.sweep, resolution=resolution))
    _check_arguments(cases, settings, config, folder)
    multiple = VAEConfig.read(folder / "vae" / "config.json").downscale
    cuda = pick_device(config.device).type == "cuda"
    with open_world(cuda=cuda, timeout=TIMEOUT) as world:
        # Each process has a GPU of its own, also where the device is named without a number.
        name = "auto" if config.device == "cuda" else config.device
        device = pick_device(name, world.local_rank)
        metrics = pick_metrics(config.metrics, cases, config.clip is not None)
        clip = None if config.clip is None else ClipFeatures.load(config.clip, device)
        made_with = _made_with(folder, config, device)
        lock = _take(config.output, made_with, world)
        weak = config.weak_weights and weights_digest(find_folder(config.weak_weights))
        trials = make_trials(cases, config.sweep, settings, made_with, weak)
        world.check_same("what is compared", key_of([trial.key for trial in trials]))
        rows = Rows(config.output, "edits", world.rank)
        scores = Rows(config.output, "scores", world.rank)
        for note in notes if world.is_main else ():
            warnings.warn(note, stacklevel=2)
        _edit(trials, rows, folder, config, device, world)
        score_trials(
            *(trials, rows, scores, clip, world),
            resolution=config.sweep.resolution,
            multiple=multiple,
        )
        world.barrier()
        if world.is_main:
            scores.read()
            lines = make_lines(trials, rows, scores, clip, config.sweep.resolution, metrics)
            csv = csv_of_edits(trials, rows, scores, clip)
            with_grids = draw(cases, config.grids) if config.grids else []
            shown = [trial for trial in trials if trial.case in with_grids]
            sheets = make_grids(
                shown, config.output, resolution=config.sweep.resolution, multiple=multiple
            )
            about = _about(weights, cases, config, clip) | {
                "computed on": computed_on(trials, rows)
            }
            notes = make_notes(config.metrics, metrics, trials, rows, scores, clip)
            print(*write_report(config.output, lines, csv, sheets, about, notes), sep="\n")
            lock.close()


def _made_with(folder: Path, config: CompareConfig, device: torch.device) -> dict[str, Any]:
    """What shapes every edit of the sweep."""
    return {
        "code": code_digest(),
        "weights": weights_digest(folder),
        "negative_instruction": config.sweep.negative_instruction,
        "resolution": config.sweep.resolution,
        "dtype": dtype_name(pick_dtype(config.dtype, device)),
    }


def _check_arguments(
    cases: Sequence[Case], settings: Sequence[EditSettings], config: CompareConfig, folder: Path
) -> None:
    """Raise InputError for what would stop the sweep later, before the weights are loaded."""
    if config.batch_size < 1:
        raise InputError(f"batch_size is {config.batch_size}, expected 1 or more")
    if config.grids < 0:
        raise InputError(f"grids is {config.grids}, expected 0 or more pictures")
    if config.weak_weights is not None:
        find_folder(config.weak_weights)
    schedule = Schedule(ScheduleConfig.read(folder / "scheduler" / "scheduler_config.json"))
    with torch.device("meta"):  # the network without its weights
        layers = UNet(UNetConfig.read(folder / "unet" / "config.json")).attention_layers
    for one in settings:
        guidance = one.make_guidance()
        guidance.check_plan(schedule.plan(one.sampler, one.spacing, one.num_steps))
        guidance.check_layers(layers)
    output = config.output.resolve()
    for case in cases:
        if output in case.source.resolve().parents:
            raise InputError(
                f"{case.source} lies in the output folder {config.output}: choose another --output"
            )
        case.check()


def _take(output: Path, made_with: dict[str, Any], world: World) -> BinaryIO | None:
    """Make the output folder ours, until the main process closes the lock that it gets.

    Raises: InputError for a folder with another sweep, or with something else in it, or that
        another run computes in.
    """
    check_writable(output)
    world.check_shared(output, "--output")
    _check_output(output, made_with)
    world.barrier()  # everyone has looked before anything is written
    lock = hold_lock(output / ".lock") if world.is_main else None
    if world.any(world.is_main and lock is None):
        raise InputError(
            f"another process is computing in {output}: wait for it, or choose another --output"
        )
    if world.is_main:
        _check_output(output, made_with)  # it may have been someone else's a moment ago
        write_json(made_with, output / SWEEP)
        for rest in (output / "edits").glob(".*.png"):  # what a killed process was writing
            rest.unlink(missing_ok=True)
    world.barrier()
    return lock


def _check_output(output: Path, made_with: dict[str, Any]) -> None:
    if (output / SWEEP).exists():
        try:
            found = read_json(output / SWEEP)
        except InputError as error:
            raise InputError(f"{error}: remove it, the edits beside it are found again") from error
        for name, value in found.items():
            if made_with.get(name) != value:
                raise InputError(
                    f"{output} holds another sweep, its {name} is {value!r}, now "
                    f"{made_with.get(name)!r}: choose another --output"
                )
    elif any(output.glob("edits_*.jsonl")):
        return  # the file was lost; each edit knows by its key what it was made with
    elif any(not child.name.startswith(".") for child in output.iterdir()):
        raise InputError(f"{output} holds other files, and no sweep: choose another --output")


def _edit(
    trials: Sequence[Trial],
    rows: Rows,
    folder: Path,
    config: CompareConfig,
    device: torch.device,
    world: World,
) -> None:
    """Compute what is missing, shared among the processes."""
    todo = missing(trials, rows)
    count = len({trial.key for trial in trials})
    world.print(f"{count} edits, {count - len(todo)} of them are there already")
    world.barrier()  # everyone has counted before anyone adds
    if mine := part_of(todo, world, config.batch_size):
        editor = Editor.load(folder, device=device, dtype=config.dtype)
        weak = None if config.weak_weights is None else editor.load_weak(config.weak_weights)
        for network in filter(None, (editor.unet, weak) if config.compile else ()):
            network.compile()
        run_trials(
            *(mine, rows, config.sweep, editor, weak, world),
            batch_size=config.batch_size,
            batch_branches=config.batch_branches,
            compiled=config.compile,
        )
    world.barrier()
    rows.read()
    check_complete(trials, rows)


def _about(
    weights: str,
    cases: Sequence[Case],
    config: CompareConfig,
    clip: ClipFeatures | None,
) -> dict[str, str]:
    """What was compared, for the head of the report."""
    sweep = config.sweep
    instructions = [*dict.fromkeys(case.instruction for case in cases)]
    more = f" and {len(instructions) - 3} more" if len(instructions) > 3 else ""
    told = {
        "command": config.command,
        "weights": weights,
        "weak weights": config.weak_weights or "",
        "pictures": f"{len(cases)}, long side {sweep.resolution} pixels",
        "instructions": "; ".join(instructions[:3]) + more,
        "negative instruction": sweep.negative_instruction,
        "seeds": ", ".join(map(str, dict.fromkeys(sweep.seeds))),
        "sampler": ", ".join(dict.fromkeys(sweep.sampler)),
        "spacing": sweep.spacing,
        "steps": ", ".join(map(str, dict.fromkeys(sweep.steps))),
        "CLIP": f"{clip.name}, pictures brought to {clip.size} x {clip.size}" if clip else "",
        "versions": f"ipx2p {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
    }
    return {name: value for name, value in told.items() if value}
