"""Checkpoints: the whole state of a run, written atomically (layer 4).

    checkpoints/step_000500/weights/      averaged (EMA), a complete weights folder
    checkpoints/step_000500/weights_raw/  the optimized weights themselves, likewise
    checkpoints/step_000500/optimizer.safetensors, state.json
    weights, weights_raw                  symbolic links into the newest checkpoint
    best, best.json                       the checkpoint with the best validation, and its score

Tensors are safetensors, the rest is JSON; there are no pickles. Frozen parts are stored once and
hard-linked from checkpoint to checkpoint.
"""

import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ipx2p.devices import free_memory
from ipx2p.errors import InputError
from ipx2p.files import flush_to_disk, read_json, remove_stale_temporaries, write_json
from ipx2p.tensor_files.tensors import copy_tensors, find_weights, load_strict, save_tensors
from ipx2p.training.config import StepsConfig
from ipx2p.weights.folder import Weights

NAME = re.compile(r"step_(\d{6,})")
KINDS = ("weights", "weights_raw")
STATE = "state.json"  # written last, with the size and checksum of every other file
BEST = "best.json"
REPLACED = ".replaced"  # ends the hidden name of a checkpoint that is being rewritten
Network = TypeVar("Network", bound=nn.Module)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of each parameter


def save_checkpoint(
    run: Path,
    step: int,
    *,
    averaged: Weights,
    raw: Weights,
    moments: Mapping[str, Tensor],
    notes: Mapping[str, int],
    config: StepsConfig,
    link_from: Path | None = None,
) -> Path:
    """Write checkpoints/step_NNNNNN, point `weights` and `weights_raw` at it, drop older ones.

    Args:
        averaged, raw: the model with the average, and with the network that is optimized. Parts
            missing from `raw` come from `averaged`, and those missing there from `link_from`.
        moments: state of the optimizer, see `optimizer_tensors`.
        notes: numbers about the run, for `state.json`.
        config: says which older checkpoints to keep; the best one always stays.
        link_from: an earlier checkpoint with the same frozen parts.
    Raises: InputError if it cannot be written whole; earlier checkpoints are then intact.
    """
    folder = run / "checkpoints" / f"step_{step:06d}"
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    averaged.save(temporary / "weights")
    raw.save(temporary / "weights_raw")
    if link_from is not None:
        _link_missing(link_from / "weights", temporary / "weights")
    _link_missing(temporary / "weights", temporary / "weights_raw")
    save_tensors(moments, temporary / "optimizer.safetensors")
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    files = {str(path.relative_to(temporary)): _fingerprint(path) for path in paths}
    write_json({"step": step, **notes, "files": files}, temporary / STATE)
    replaced = folder.with_name(f".{folder.name}{REPLACED}")
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    with suppress(OSError):  # not every file system flushes folders
        flush_to_disk(folder.parent)
    point_at(run, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    best = _read_best(run).get("step")
    for old in find_checkpoints(run)[: -config.keep_checkpoints]:
        regular = config.keep_every is not None and num_steps(old) % config.keep_every == 0
        if not regular and num_steps(old) != best:
            hidden = old.with_name(f".{old.name}.removed")
            old.rename(hidden)  # so that half of it is never taken for a whole one
            shutil.rmtree(hidden)
    return folder


class CheckpointSaver:
    """Saves the checkpoints of a run, one at a time, in the background if asked to and if a copy
    of the trained network fits into memory.

    A checkpoint that could not be written is reported at once; the run continues to the next one.
    """

    def __init__(self, run: Path, part: str, config: StepsConfig, *, background: bool) -> None:
        self.run = run
        self.part = part
        self.config = config
        self.background = background
        self.error: InputError | None = None  # of the last one
        self.newest: Path | None = None  # written by this process, so known to be whole
        self._thread: threading.Thread | None = None

    def save(
        self,
        step: int,
        averaged: Weights,
        raw: Weights,
        optimizer: Optimizer,
        notes: dict[str, int],
    ) -> None:
        """Save the current state; in the background, only copying the network takes time."""
        self.wait()
        network = getattr(raw, self.part)
        moments = optimizer_tensors(network, optimizer)
        copied = 2 * [*network.state_dict().values()] + [*moments.values()]
        fits = sum(tensor.nbytes for tensor in copied) <= free_memory(torch.device("cpu")) / 2
        if self.background and fits:
            averaged, raw = (
                replace(weights, **{self.part: _copy_to_cpu(getattr(weights, self.part))})
                for weights in (averaged, raw)
            )
            moments = {name: tensor.to("cpu", copy=True) for name, tensor in moments.items()}
        parts = {"averaged": averaged, "raw": raw, "moments": moments, "notes": notes}
        if self.background and fits:
            self._thread = threading.Thread(target=self._save, args=(step, parts))
            self._thread.start()
        else:
            self._save(step, parts)

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Wait, and raise the error of the last checkpoint if it was not written."""
        self.wait()
        if self.error is not None:
            raise self.error

    def _save(self, step: int, parts: dict[str, Any]) -> None:
        self.error = None
        parts |= {"config": self.config, "link_from": self.newest}
        try:
            self.newest = save_checkpoint(self.run, step, **parts)
        except Exception as error:  # of any library: nothing else watches this thread
            self.error = InputError(f"checkpoint of step {step} was not written: {error}")
            print(f"warning: {self.error}; the next one will be tried", file=sys.stderr, flush=True)
            shutil.rmtree(self.run / "checkpoints" / f".step_{step:06d}", ignore_errors=True)


def _copy_to_cpu(module: Network) -> Network:
    """The same network with a copy of its weights, on the CPU."""
    with torch.device("meta"):
        copied = type(module)(module.config)
    tensors = {name: t.detach().to("cpu", copy=True) for name, t in module.state_dict().items()}
    load_strict(copied, tensors, "the copy for a checkpoint")
    return copied


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    complete = [f for f in folders if NAME.fullmatch(f.name) and (f / STATE).exists()]
    return sorted(complete, key=num_steps)


def num_steps(checkpoint: Path) -> int:
    """The number of steps done at a checkpoint."""
    return int(NAME.fullmatch(checkpoint.name)[1])


def sweep(run: Path) -> None:
    """Remove unfinished files of a killed process; for the process that holds the run's lock."""
    for folder in (run, run / "samples"):
        remove_stale_temporaries(folder)
    for rest in (run / "checkpoints").glob(".step_*"):
        original = rest.with_name(rest.name.removeprefix(".").removesuffix(REPLACED))
        if rest.name.endswith(REPLACED) and not original.exists():
            rest.rename(original)  # the process was killed between the two renames
        else:
            shutil.rmtree(rest)


def mark_best(run: Path, step: int, score: float) -> None:
    """Keep the checkpoint of a step, and point `best` at it, if no validation has scored higher."""
    checkpoint = run / "checkpoints" / f"step_{step:06d}"
    best = _read_best(run).get("score")
    if checkpoint.exists() and (best is None or score > best):
        write_json({"step": step, "score": score}, run / BEST)
        _point(run / "best", checkpoint)


def forget_best_score(run: Path) -> None:
    """Make the next validated checkpoint the best one; the current one is kept until then."""
    if best := _read_best(run):
        write_json(best | {"score": None}, run / BEST)


def _read_best(run: Path) -> dict[str, Any]:
    """`step` and `score` of the best checkpoint, once there is one."""
    return read_json(run / BEST) if (run / BEST).exists() else {}


def damages(folder: Path) -> dict[str, str]:
    """The files of a checkpoint that have changed since it was written, with a line about each."""
    try:
        state = read_json(folder / STATE)
    except InputError as error:
        return {STATE: str(error)}
    if state.get("step") != num_steps(folder) or not isinstance(state.get("files"), dict):
        return {STATE: f"{folder / STATE} is damaged: it has another step, or no list of files"}
    found = {}
    for name, expected in state["files"].items():
        try:
            if _fingerprint(folder / name) != expected:
                found[name] = f"{folder / name} is damaged: it has changed since it was written"
        except OSError as error:
            found[name] = f"cannot read {folder / name}: {error.strerror}"
    return found


def is_trained(name: str, part: str) -> bool:
    """Whether a file of a checkpoint holds trained state, without which it cannot be resumed."""
    places = (f"{kind}/{part}/" for kind in KINDS)
    return name.startswith((*places, "optimizer.safetensors", STATE))


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not used again; returns its new path."""
    place = folder.with_name(f"damaged_{folder.name}")
    shutil.rmtree(place, ignore_errors=True)
    return folder.rename(place)


def load_checkpoint(
    folder: Path, *, part: str, average: nn.Module, module: nn.Module, optimizer: Optimizer
) -> dict[str, int]:
    """Restore average, network and optimizer; returns what `state.json` says: `step` and notes.

    Raises: InputError for a damaged checkpoint, or one of a network of other sizes.
    """
    for kind, network in zip(KINDS, (average, module), strict=True):
        copy_tensors(network.state_dict(), find_weights(folder / kind / part))
    load_optimizer(module, optimizer, folder / "optimizer.safetensors")
    return read_json(folder / STATE)


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, PARAMETER.STATE."""
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in module.named_parameters()
        for key in MOMENTS
    }


def load_optimizer(module: nn.Module, optimizer: Optimizer, path: Path) -> None:
    """Read what `optimizer_tensors` gave. Moments get their parameter's device and memory layout,
    because a fused optimizer reads both in memory order."""
    for parameter in module.parameters():
        moment = torch.empty_like(parameter, requires_grad=False)
        step = torch.zeros((), device=parameter.device)  # where a fused optimizer counts
        state = (step, moment, torch.empty_like(moment))
        optimizer.state[parameter] = dict(zip(MOMENTS, state, strict=True))
    copy_tensors(optimizer_tensors(module, optimizer), path)


def point_at(run: Path, checkpoint: Path) -> None:
    """Point `weights` and `weights_raw` at a checkpoint, each atomically."""
    for kind in KINDS:
        _point(run / kind, checkpoint / kind)


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _link_missing(source: Path, target: Path) -> None:
    """Add every file of `source` that `target` lacks, as a hard link if possible."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir() or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, place)
