"""What a run says about itself: a line of text, JSON lines and TensorBoard (layer 4)."""

import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ipx2p.data.cache import EncodedBatch
from ipx2p.data.loader import Batch
from ipx2p.devices import memory_bytes, pick_dtype
from ipx2p.distributed import World
from ipx2p.files import atomic_write
from ipx2p.training.config import StepsConfig
from ipx2p.training.learners import Losses
from ipx2p.training.speed import peak_flops
from ipx2p.training.validation import Report


class Monitor:
    """Gathers losses, time and mishaps of the steps, and writes them every `log_every` steps.

    Only then does it wait for the device; what it needs until then stays there.

    Args:
        folder: of the run.
        steps_done: before this process.
        flops_per_sample: of forward and backward pass of what is trained; None if not counted.
    """

    def __init__(
        self,
        folder: Path,
        config: StepsConfig,
        world: World,
        device: torch.device,
        *,
        steps_done: int,
        flops_per_sample: float | None,
    ) -> None:
        self.config = config
        self.world = world
        self.device = device
        self.flops_per_sample = flops_per_sample
        if flops_per_sample is not None:
            self.peak = world.size * peak_flops(device, pick_dtype(config.precision, device))
        self.steps_done = self.logged_step = steps_done
        self.records: list[tuple[list[Losses], Tensor]] = []
        self.busy_s = self.logged_busy_s = self.waiting_s = 0.0
        self.bad_steps = self.bad_in_row = self.most_bad_in_row = 0
        self.skipped: set[str] = set()  # what was wrong with which pair, in this process
        self.named: set[str] = set()  # of those of all processes, what was said
        self.folder = folder
        self.lines = folder / "metrics.jsonl"
        self.board: SummaryWriter | None = None
        self.is_writing = True
        if world.is_main:
            threading.excepthook = _pass_over_writer
            _cut_lines(self.lines, steps_done)
        self.resume()

    def resume(self) -> None:
        """Start the clock of the next step; what came before it is no part of it."""
        self.since = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for data."""
        since = time.monotonic()
        yield
        self.waiting_s += time.monotonic() - since

    def note_skipped(self, batches: Sequence[Batch | EncodedBatch]) -> None:
        """Remember the pairs that others stood for; they are named with the next line."""
        for batch in batches:
            if isinstance(batch, Batch):
                self.skipped.update(batch.skipped)

    def step(
        self, step: int, losses: list[Losses], rate: float, grad_norm: Tensor, bad: Tensor
    ) -> None:
        """Note one finished step, counted from 1; every `log_every` steps, say so."""
        self.records.append((losses, bad))
        due = step % self.config.log_every == 0 or step == self.config.steps
        if due:
            values = self._collect(step)  # waits for the device
            values |= {"learning_rate": rate, "grad_norm": grad_norm.item()}
        now = time.monotonic()
        self.busy_s += now - self.since
        self.since = now
        if due:
            self._log(step, values | self._speed(step))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write numbers to TensorBoard and as a line of JSON."""

        def write(board: SummaryWriter) -> None:
            numbers = {k: v if math.isfinite(v) else None for k, v in values.items()}
            _append(self.lines, json.dumps({"step": step, **numbers}) + "\n")
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._write(write)

    def report(self, step: int, report: Report) -> None:
        """Write a validation."""
        self.scalars(step, report.scalars())
        sheet = np.asarray(report.sheet)
        self._write(lambda board: board.add_image("samples", sheet, step, dataformats="HWC"))
        self._write(lambda board: board.flush())

    def close(self) -> None:
        """Flush what is not yet on disk."""
        if self.board is not None:
            self._write(lambda board: board.close())
        threading.excepthook = threading.__excepthook__

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        """Write on the main process; a full disk costs some of the log, not the run."""
        if not self.world.is_main:
            return
        try:
            if self.board is None:
                # What was written after the last checkpoint will be written again.
                folder, purge_step = self.folder / "tensorboard", self.steps_done + 1
                self.board = SummaryWriter(folder, purge_step=purge_step)
            write(self.board)
            self.is_writing = True
        except OSError as error:
            if self.is_writing:
                print(f"warning: the log is not written: {error}", file=sys.stderr, flush=True)
            self.is_writing, self.board = False, None

    def _collect(self, step: int) -> dict[str, float]:
        """Means over the steps since the last line and over all processes."""
        first = step - len(self.records) + 1
        losses = [part for parts, _ in self.records for part in parts]
        bad = torch.stack([bad for _, bad in self.records]).tolist()
        plain = torch.cat([part.plain for part in losses]).tolist()
        names = ["loss"] * len(plain)
        if losses[0].quartiles is not None:
            quartiles = torch.cat([part.quartiles for part in losses])
            names = [f"loss_q{quartile + 1}" for quartile in quartiles.tolist()]
        sums: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for name, value in zip(names, plain, strict=True):
            if math.isfinite(value):
                sums[name] += value
                counts[name] += 1
        hidden = sum((Counter(part.hidden) for part in losses), Counter())
        self.records.clear()
        for offset, left_out in enumerate(bad):
            self._count_bad(first + offset, bool(left_out))

        gathered = self.world.gather((sums, counts, hidden, self.skipped - self.named))
        sums = sum((part[0] for part in gathered), Counter())
        counts = sum((part[1] for part in gathered), Counter())
        hidden = sum((part[2] for part in gathered), Counter())
        for error in sorted(set().union(*(part[3] for part in gathered))):
            self.world.print(f"warning: skipped {error}")
            self.named.add(error)
        return {
            "loss": sum(sums.values()) / counts.total() if counts else math.nan,
            **{name: sums[name] / counts[name] for name in sorted(sums) if name != "loss"},
            **{f"hidden_{name}": hidden[name] for name in losses[0].hidden},
            "bad_steps": self.bad_steps,
            "data/skipped": len(self.named),
        }

    def _count_bad(self, step: int, bad: bool) -> None:
        self.bad_in_row = self.bad_in_row + 1 if bad else 0
        self.most_bad_in_row = max(self.most_bad_in_row, self.bad_in_row)
        if not bad:
            return
        self.bad_steps += 1
        first = (step - 1) * self.config.batch_size
        self.world.print(
            f"step {step}: loss or gradient is not finite, update left out (samples {first} to "
            f"{first + self.config.batch_size - 1}; {self.bad_in_row} in a row)"
        )

    def _speed(self, step: int) -> dict[str, float]:
        num_steps = step - self.logged_step
        busy_s = self.busy_s - self.logged_busy_s
        rate = num_steps * self.config.batch_size / busy_s
        values = {
            "samples_per_s": rate,
            "step_s": busy_s / num_steps,
            "waiting_share": self.waiting_s / busy_s,
            "samples_seen": step * self.config.batch_size,
        }
        if self.flops_per_sample is not None:
            values["mfu"] = rate * self.flops_per_sample / self.peak
        values["memory_gib"] = memory_bytes(self.device) / 2**30
        self.logged_step, self.logged_busy_s, self.waiting_s = step, self.busy_s, 0.0
        return values

    def _log(self, step: int, values: dict[str, float]) -> None:
        step_s = self.busy_s / (step - self.steps_done)
        eta = _clock(step_s * (self.config.steps - step))
        mfu = f"  mfu {values['mfu']:.1%}" if "mfu" in values else ""
        self.world.print(
            f"step {step}/{self.config.steps}  loss {values['loss']:.4f}  "
            f"{values['samples_per_s']:.1f} samples/s{mfu}  "
            f"waiting {values['waiting_share']:.0%}  eta {eta}"
        )
        self.scalars(step, values)


def _pass_over_writer(args: threading.ExceptHookArgs) -> None:
    """No traceback when TensorBoard's thread cannot write: its next call here tells."""
    of_writer = type(args.thread).__module__.startswith("tensorboard.")
    if not (of_writer and issubclass(args.exc_type, OSError)):
        threading.__excepthook__(args)


def _append(path: Path, line: str) -> None:
    """Add a line, or nothing."""
    with path.open("a") as file:
        end = file.tell()
        try:
            file.write(line)
            file.flush()
        except OSError:
            os.truncate(path, end)
            raise


def _cut_lines(path: Path, steps_done: int) -> None:
    """Keep the lines of the steps done; later ones, and one that a kill cut short, go."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError):
            if json.loads(line)["step"] <= steps_done:
                kept.append(f"{line}\n")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
