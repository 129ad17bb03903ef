"""Checkpoints: all state of a run, written whole or not at all (layer 4).

    checkpoints/step_000500/weights/      averaged (EMA), a complete weights folder
    checkpoints/step_000500/weights_raw/  the optimized weights themselves, likewise
    checkpoints/step_000500/optimizer.safetensors, state.json
    weights, weights_raw                  symbolic links into the newest checkpoint

Tensors are safetensors, the rest is JSON; there are no pickles. Parts that are not trained are
stored once and hard-linked from checkpoint to checkpoint.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ipx2p.errors import InputError
from ipx2p.files import flush_to_disk, read_json, write_json
from ipx2p.tensors import check_fit, find_weights, read_tensors, save_tensors
from ipx2p.weights.folder import Weights

NAME = re.compile(r"step_(\d{6,})")
KINDS = ("weights", "weights_raw")
STATE = "state.json"  # written last
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def save_checkpoint(
    run: Path,
    step: int,
    *,
    part: str,
    averaged: Weights,
    raw: Weights,
    optimizer: Optimizer,
    keep: int,
) -> Path:
    """Write checkpoints/step_NNNNNN, point `weights` and `weights_raw` at it, drop the oldest.

    Args:
        part: what is trained, "unet" or "vae": the name of its folder.
        averaged, raw: the whole model with the average, and with the network that the optimizer
            works on.
        keep: how many checkpoints stay, this one included.
    """
    folder = run / "checkpoints" / f"step_{step:06d}"
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    earlier = find_checkpoints(run)
    if earlier:
        getattr(averaged, part).save(temporary / "weights" / part)
        _link_missing(earlier[-1] / "weights", temporary / "weights")
    else:
        averaged.save(temporary / "weights")
    getattr(raw, part).save(temporary / "weights_raw" / part)
    _link_missing(temporary / "weights", temporary / "weights_raw")
    moments = optimizer_tensors(getattr(raw, part), optimizer)
    save_tensors(moments, temporary / "optimizer.safetensors")
    write_json({"step": step}, temporary / STATE)
    _remove(folder)
    temporary.rename(folder)
    with suppress(OSError):  # not every file system flushes folders
        flush_to_disk(folder.parent)
    point_at(run, folder)
    for old in find_checkpoints(run)[:-keep]:
        _remove(old)
    return folder


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    complete = [f for f in folders if NAME.fullmatch(f.name) and (f / STATE).exists()]
    return sorted(complete, key=num_steps)


def num_steps(checkpoint: Path) -> int:
    """The number of steps done at a checkpoint."""
    return int(NAME.fullmatch(checkpoint.name)[1])


def sweep(run: Path) -> None:
    """Remove what a killed process left unfinished; for the process that owns the run."""
    for rest in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(rest)


def load_checkpoint(
    folder: Path, *, part: str, average: nn.Module, module: nn.Module, optimizer: Optimizer
) -> int:
    """Bring average, network and optimizer to where the checkpoint left them.

    Returns: the number of steps done.
    Raises: InputError for a damaged checkpoint, or one of a network of other sizes.
    """
    for kind, network in zip(KINDS, (average, module), strict=True):
        path = find_weights(folder / kind / part)
        tensors = read_tensors(path)
        check_fit(network.state_dict(), tensors, str(path))
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                tensor.copy_(tensors[name])
    path = folder / "optimizer.safetensors"
    load_optimizer(module, optimizer, read_tensors(path), str(path))
    step = read_json(folder / STATE).get("step")
    if step != num_steps(folder):
        raise InputError(f"{folder / STATE}: step is {step!r}, expected {num_steps(folder)}")
    return step


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, PARAMETER.STATE."""
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in module.named_parameters()
        for key in MOMENTS
    }


def load_optimizer(
    module: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor], where: str
) -> None:
    """The inverse of `optimizer_tensors`. Moments get their parameter's device and memory layout:
    a fused optimizer walks both side by side in memory."""
    expected = {}
    for name, parameter in module.named_parameters():
        moment = torch.empty_like(parameter, requires_grad=False)
        expected |= {f"{name}.step": torch.zeros(()), f"{name}.exp_avg": moment}
        expected |= {f"{name}.exp_avg_sq": torch.empty_like(moment)}
    check_fit(expected, tensors, where)
    for name, parameter in module.named_parameters():
        for key in MOMENTS:
            state = expected[f"{name}.{key}"]
            optimizer.state[parameter][key] = state.copy_(tensors[f"{name}.{key}"])


def point_at(run: Path, checkpoint: Path) -> None:
    """Make `weights` and `weights_raw` those of a checkpoint, each in one go."""
    for kind in KINDS:
        temporary = run / f".{kind}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(checkpoint / kind, run))
        temporary.replace(run / kind)


def _link_missing(source: Path, target: Path) -> None:
    """Put every file of `source` that `target` lacks there too, as a hard link if possible."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir() or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, place)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that half of it is never taken for one."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)
