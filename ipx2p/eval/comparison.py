"""Compare guidance: edit every combination, measure, and report (layer 4).

OUTPUT/  edits/KEY.png  edits_RANK.jsonl  scores_RANK.jsonl  sweep.json      what was computed
         index.html  table.md  table.csv  edits.csv  grids/  curves/         the report
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ipx2p import __version__
from ipx2p.devices import dtype_name, pick_device, pick_dtype
from ipx2p.distributed import World, open_world
from ipx2p.editor import Editor
from ipx2p.errors import InputError
from ipx2p.eval.cases import Case, draw
from ipx2p.eval.features import ClipFeatures
from ipx2p.eval.grids import make_grids
from ipx2p.eval.report import write_report
from ipx2p.eval.rows import Rows, key_of
from ipx2p.eval.scores import pick_metrics, score_trials
from ipx2p.eval.sweep import (
    SweepConfig,
    Trial,
    make_trials,
    missing,
    run_trials,
    weights_digest,
)
from ipx2p.eval.tables import check_complete, csv_of_edits, make_lines
from ipx2p.files import check_writable, read_json, write_json
from ipx2p.models.vae import VAEConfig
from ipx2p.weights.readers import find_folder

SWEEP = "sweep.json"


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
    if config.batch_size < 1:
        raise InputError(f"batch_size is {config.batch_size}, expected 1 or more")
    if inside := [
        case for case in cases if config.output.resolve() in case.source.resolve().parents
    ]:
        raise InputError(
            f"{inside[0].source} lies in the output folder {config.output}: choose another --output"
        )
    if config.grids < 0:
        raise InputError(f"grids is {config.grids}, expected 0 or more pictures")
    folder = find_folder(weights)
    multiple = VAEConfig.read(folder / "vae" / "config.json").downscale
    cuda = pick_device(config.device).type == "cuda"
    with open_world(cuda=cuda) as world:
        # Each process has a GPU of its own, also where the device is named without a number.
        name = "auto" if config.device == "cuda" else config.device
        device = pick_device(name, world.local_rank)
        clip = None if config.clip is None else ClipFeatures.load(config.clip, device)
        metrics = pick_metrics(config.metrics, cases, clip)
        made_with = _made_with(folder, config, device)
        _check_output(config.output, made_with, world)
        trials = make_trials(cases, config.sweep, settings, made_with)
        world.check_same("what is compared", key_of([trial.key for trial in trials]))
        rows = Rows(config.output, "edits", world.rank)
        scores = Rows(config.output, "scores", world.rank)
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
            about = _about(weights, cases, config, device, clip)
            print(*write_report(config.output, lines, csv, sheets, about, metrics), sep="\n")


def _made_with(folder: Path, config: CompareConfig, device: torch.device) -> dict[str, Any]:
    """What shapes every edit of the sweep."""
    weak = None if config.weak_weights is None else find_folder(config.weak_weights)
    return {
        "weights": weights_digest(folder),
        "weak_weights": weak and weights_digest(weak),
        "negative_instruction": config.sweep.negative_instruction,
        "resolution": config.sweep.resolution,
        "dtype": dtype_name(pick_dtype(config.dtype, device)),
    }


def _check_output(output: Path, made_with: dict[str, Any], world: World) -> None:
    """Raise InputError for a folder with another sweep, or with something else, in it."""
    check_writable(output)
    world.check_shared(output, "--output")
    path = output / SWEEP
    if path.exists():
        for name, value in read_json(path).items():
            if made_with.get(name) != value:
                raise InputError(
                    f"{output} holds another sweep, its {name} is {value!r}, now "
                    f"{made_with.get(name)!r}: choose another --output"
                )
    elif any(not child.name.startswith(".") for child in output.iterdir()):
        raise InputError(f"{output} holds other files, and no sweep: choose another --output")
    world.barrier()  # everyone has looked before anything is written
    if world.is_main and not path.exists():
        write_json(made_with, path)
    world.barrier()


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
    world.print(f"{len(trials)} edits, {len(trials) - len(todo)} of them are there already")
    world.barrier()  # everyone has counted before anyone adds
    if mine := world.share(todo):
        editor = Editor.load(folder, device=device, dtype=config.dtype)
        weak = None if config.weak_weights is None else editor.load_weak(config.weak_weights)
        for network in filter(None, (editor.unet, weak) if config.compile else ()):
            network.compile()
        run_trials(
            *(mine, rows, config.sweep, editor, weak, world),
            batch_size=config.batch_size,
            batch_branches=config.batch_branches,
        )
    world.barrier()
    rows.read()
    check_complete(trials, rows)


def _about(
    weights: str,
    cases: Sequence[Case],
    config: CompareConfig,
    device: torch.device,
    clip: ClipFeatures | None,
) -> dict[str, str]:
    """What was compared, for the head of the report."""
    sweep = config.sweep
    instructions = [*dict.fromkeys(case.instruction for case in cases)]
    more = f" and {len(instructions) - 3} more" if len(instructions) > 3 else ""
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    told = {
        "command": config.command,
        "weights": weights,
        "weak weights": config.weak_weights or "",
        "pictures": f"{len(cases)}, long side {sweep.resolution} pixels",
        "instructions": "; ".join(instructions[:3]) + more,
        "negative instruction": sweep.negative_instruction,
        "seeds": ", ".join(map(str, sweep.seeds)),
        "spacing": sweep.spacing,
        "CLIP": f"{clip.name}, pictures brought to {clip.size} x {clip.size}" if clip else "",
        "computed on": f"{device}{gpu}, {dtype_name(pick_dtype(config.dtype, device))}, edits in "
        f"batches of {config.batch_size}, which share their seconds",
        "versions": f"ipx2p {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
    }
    return {name: value for name, value in told.items() if value}
