"""Compare guidance: edit every combination, measure, and report (layer 4).

OUTPUT/  edits/KEY.png  edits_RANK.jsonl  scores_RANK.jsonl  sweep.json      what was computed
         index.html  table.md  *.csv  grids/  curves/                        the report
"""

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ipx2p import __version__
from ipx2p.devices import dtype_name, pick_device, pick_dtype
from ipx2p.diffusion.samplers import make_plan
from ipx2p.diffusion.schedule import Schedule, ScheduleConfig
from ipx2p.distributed import World, open_world
from ipx2p.editing.files import load_editor
from ipx2p.editing.settings import EditSettings, pick_resolution
from ipx2p.errors import InputError
from ipx2p.eval.cases import Case, draw
from ipx2p.eval.features import ClipFeatures
from ipx2p.eval.grids import make_grids
from ipx2p.eval.report import make_notes, note_of_choice, write_report
from ipx2p.eval.rows import Rows, key_of
from ipx2p.eval.scores import Results, pick_metrics
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
from ipx2p.eval.tables import choose, computed_on, csv_of_edits, csv_of_lines, make_lines
from ipx2p.files import check_writable, hold_lock, read_json, write_json
from ipx2p.models.unet import UNet, UNetConfig
from ipx2p.weights.readers import find_folder

SWEEP = "sweep.json"
CODE_CHANGED = (
    "made by other code (networks, samplers, guidance or editing have changed since), so that its "
    "edits would not compare with new ones"
)
TIMEOUT = timedelta(days=7)  # finished processes wait for the others


@dataclass
class CompareConfig(SweepConfig):
    """What is combined, where it is computed, and what is reported.

    select_on: the manifest that the best scales are chosen on. clip: folder or hub id of a CLIP
    model. metrics: None is all that can be measured. grids: how many pictures get sheets.
    """

    output: Path = Path("compare")
    weak_weights: str | None = None
    select_on: Path | None = None
    clip: str | None = None
    metrics: list[str] | None = None
    grids: int = 4
    device: str = "auto"
    dtype: str = "auto"
    command: str = ""


def compare(
    weights: str, cases: Sequence[Case], config: CompareConfig, choosing: Sequence[Case] = ()
) -> None:
    """Run a sweep over the cases and write its report; only what is missing is computed.

    Several processes of `torchrun` share the edits.

    Args:
        choosing: other cases to choose the best scales on; none: the cases themselves.
    Raises: InputError for bad arguments or files, before the weights are loaded where possible.
    """
    settings = config.settings(has_weak=config.weak_weights is not None)
    folder = find_folder(weights)
    resolution, multiple, warned = pick_resolution(folder, config.resolution)
    config = replace(config, resolution=resolution)
    if choosing:
        choosing = _check_choosing(cases, choosing, config.select_on)
    _check_arguments([*cases, *choosing], settings, config, folder)
    cuda = pick_device(config.device).type == "cuda"
    with open_world(cuda=cuda, timeout=TIMEOUT) as world:
        # Each process has its own GPU, even if the device is named without a number.
        name = "auto" if config.device == "cuda" else config.device
        device = pick_device(name, world.local_rank)
        metrics = pick_metrics(config.metrics, cases, config.clip is not None)
        clip = None if config.clip is None else ClipFeatures.load(config.clip, device)
        made_with = _made_with(folder, config, device)
        lock = _take(config.output, made_with, world)
        weak = config.weak_weights and weights_digest(find_folder(config.weak_weights))
        trials, deciding = (
            make_trials(some, config, settings, made_with, weak) for some in (cases, choosing)
        )
        everything = [*trials, *deciding]
        world.check_same("what is compared", key_of([trial.key for trial in everything]))
        rows, scores = (Rows(config.output, stem, world.rank) for stem in ("edits", "scores"))
        for warning in warned if world.is_main else ():
            warnings.warn(warning, stacklevel=2)
        _edit(everything, rows, folder, config, device, world)
        results = Results(everything, rows, scores, clip, config.resolution, multiple)
        results.measure(world)
        world.barrier()
        if world.is_main:
            scores.read()
            results = replace(results, trials=trials)
            others = make_lines(replace(results, trials=deciding), metrics) if deciding else []
            lines = make_lines(results, metrics)
            lines = choose(lines, others or lines)
            tables = {"table.csv": csv_of_lines(lines), "edits.csv": csv_of_edits(results)}
            if others:
                tables["chosen_on.csv"] = csv_of_lines(others)
            sheets = make_grids(results, draw(cases, config.grids) if config.grids else [])
            about = _about(weights, cases, config, clip) | {"computed on": computed_on(results)}
            notes = make_notes(config.metrics, metrics, results)
            notes += note_of_choice(lines, config.select_on)
            print(*write_report(config.output, lines, tables, sheets, about, notes), sep="\n")
            lock.close()


def _check_choosing(cases: Sequence[Case], choosing: Sequence[Case], path: Path) -> list[Case]:
    """Those of the reported tasks; InputError for a task without any, or a reported pair."""
    tasks = {case.task for case in cases}
    if lacking := tasks - {case.task for case in choosing}:
        raise InputError(f"--select-on {path} has no pairs of the task {min(lacking)!r}: add some")
    sources = {(case.digest, case.task) for case in cases}
    if shared := [case for case in choosing if (case.digest, case.task) in sources]:
        raise InputError(
            f"--select-on {path}: {len(shared)} of its pictures are also reported on, "
            f"{shared[0].source} is one: choose the scales on other pictures"
        )
    return [case for case in choosing if case.task in tasks]


def _made_with(folder: Path, config: CompareConfig, device: torch.device) -> dict[str, Any]:
    """What shapes every edit of the sweep."""
    return {
        "code": code_digest(),
        "weights": weights_digest(folder),
        "negative_instruction": config.negative_instruction,
        "resolution": config.resolution,
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
    schedule = Schedule(ScheduleConfig.load(folder))
    with torch.device("meta"):  # the network without its weights
        layers = UNet(UNetConfig.read(folder / "unet" / "config.json")).attention_layers
    for one in settings:
        guidance = one.spec
        guidance.check_plan(make_plan(schedule, one.sampler, one.spacing, one.num_steps))
        guidance.check_layers(layers)
    output = config.output.resolve()
    for case in cases:
        if output in case.source.resolve().parents:
            raise InputError(
                f"{case.source} lies in the output folder {config.output}: choose another --output"
            )
        case.check()


def _take(output: Path, made_with: dict[str, Any], world: World) -> BinaryIO | None:
    """Lock the output folder until the main process closes the returned lock.

    Raises: InputError for a folder with another sweep, other files, or another run at work.
    """
    check_writable(output)
    world.check_shared(output, "--output")
    _check_output(output, made_with)
    world.barrier()  # all have checked before anything is written
    lock = hold_lock(output / ".lock") if world.is_main else None
    if world.any(world.is_main and lock is None):
        raise InputError(
            f"another process is computing in {output}: wait for it, or choose another --output"
        )
    if world.is_main:
        _check_output(output, made_with)  # another run may have just finished in it
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
            raise InputError(f"{error}: remove it, the edits beside it will be found") from error
        for name in sorted(found, key="code".__eq__):  # the code last: it says the least
            if made_with.get(name) != found[name]:
                why = f"its {name} is {found[name]!r}, now {made_with.get(name)!r}"
                raise InputError(
                    f"{output} holds another sweep, {CODE_CHANGED if name == 'code' else why}: "
                    "choose another --output"
                )
    elif any(output.glob("edits_*.jsonl")):
        return  # the file was lost; the key of each edit depends on what it was made with
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
    """Compute what is missing, shared among the processes.

    Raises: InputError if edits are still missing at the end.
    """
    todo = missing(trials, rows)
    count = len({trial.key for trial in trials})
    world.print(f"{count} edits, {count - len(todo)} of them are there already")
    world.barrier()  # all have counted before anyone adds one
    if mine := part_of(todo, world, config.batch_size):
        networks = load_editor(folder, config.weak_weights, device, config.dtype, config.compile)
        run_trials(mine, rows, config, *networks, world)
    world.barrier()
    rows.read()
    if lost := [trial for trial in trials if trial.key not in rows.by_key]:
        raise InputError(
            f"{len(lost)} of {len(trials)} edits are not in {config.output}: run it again"
        )


def _about(
    weights: str, cases: Sequence[Case], config: CompareConfig, clip: ClipFeatures | None
) -> dict[str, str]:
    """What was compared, for the head of the report."""
    instructions = [*dict.fromkeys(case.instruction for case in cases)]
    more = f" and {len(instructions) - 3} more" if len(instructions) > 3 else ""
    facts = {
        "command": config.command,
        "weights": weights,
        "weak weights": config.weak_weights or "",
        "pictures": f"{len(cases)}, long side {config.resolution} pixels",
        "instructions": "; ".join(instructions[:3]) + more,
        "negative instruction": config.negative_instruction,
        "seeds": ", ".join(map(str, dict.fromkeys(config.seeds))),
        "sampler": ", ".join(dict.fromkeys(config.sampler)),
        "spacing": config.spacing,
        "steps": ", ".join(map(str, dict.fromkeys(config.num_steps))),
        "CLIP": f"{clip.name}, pictures resized to {clip.size} x {clip.size}" if clip else "",
        "versions": f"ipx2p {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
    }
    return {name: value for name, value in facts.items() if value}
