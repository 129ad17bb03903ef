"""What a run reports about itself: text, JSON lines and TensorBoard (layer 4)."""

import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
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
from ipx2p.training.learner import Losses
from ipx2p.training.speed import peak_flops
from ipx2p.training.validation import Report


class Monitor:
    """Gathers losses, time and bad updates of the steps, and writes them every `log_every` steps.

    Only then does it wait for the device; everything it needs stays there until then.

    Args:
        folder: of the run.
        steps_done, bad_steps: before this process.
        flops_per_sample: of forward and backward pass of the trained network; None: no MFU.
    """

    def __init__(
        self,
        folder: Path,
        config: StepsConfig,
        world: World,
        device: torch.device,
        *,
        steps_done: int,
        bad_steps: int,
        flops_per_sample: float | None,
    ) -> None:
        self.config = config
        self.world = world
        self.device = device
        self.flops_per_sample = flops_per_sample
        if flops_per_sample is not None:
            self.peak = world.size * peak_flops(device, pick_dtype(config.precision, device))
        self.steps_done = self.logged_step = steps_done
        # Of each step since the last row: losses, whether it was bad, rate, norm of the gradient.
        self.records: list[tuple[list[Losses], Tensor, float, Tensor]] = []
        self.busy_s = self.logged_busy_s = self.waiting_s = 0.0
        self.bad_steps, self.bad_in_row = bad_steps, 0
        self.worst_row = (0, 0)  # length and first step of the longest row of bad steps
        self.skipped: set[str] = set()  # one line per pair that could not be used, here
        self.named: set[str] = set()  # those of all processes that were already printed
        self.folder = folder
        self.lines = folder / "metrics.jsonl"
        self.board: SummaryWriter | None = None
        # TensorBoard drops earlier points from here on: the steps after the checkpoint run again.
        self.purge_step: int | None = steps_done + 1
        self.is_writing = True
        if world.is_main:
            threading.excepthook = _pass_over_writer
            _cut_lines(self.lines, steps_done)
        self.resume()

    def resume(self) -> None:
        """Start the clock of the next step; time before this call does not count."""
        self.since = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time spent waiting for data."""
        since = time.monotonic()
        yield
        self.waiting_s += time.monotonic() - since

    def note_skipped(self, batches: Sequence[Batch | EncodedBatch]) -> None:
        """Remember the pairs that were replaced; the next line names them."""
        for batch in batches:
            if isinstance(batch, Batch):
                self.skipped.update(batch.skipped)

    def step(
        self, step: int, losses: list[Losses], rate: float, grad_norm: Tensor, bad: Tensor
    ) -> None:
        """Note one finished step, counted from 1; every `log_every` steps, write a row."""
        self.records.append((losses, bad, rate, grad_norm))
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.log()
        else:
            self._stop_clock()

    def log(self) -> None:
        """Write a row about the steps since the last one, if there were any."""
        if not self.records:
            return
        step = self.logged_step + len(self.records)
        *_, rate, grad_norm = self.records[-1]
        values = self._collect()  # waits for the device
        self._stop_clock()
        values |= {"learning_rate": rate, "grad_norm": grad_norm.item(), **self._speed(step)}
        step_s = self.busy_s / (step - self.steps_done)
        eta = timedelta(seconds=round(step_s * (self.config.steps - step)))
        mfu = f"  mfu {values['mfu']:.1%}" if "mfu" in values else ""
        self.world.print(
            f"step {step}/{self.config.steps}  loss {values['loss']:.4f}  "
            f"{values['samples_per_s']:.1f} samples/s{mfu}  "
            f"waiting {values['waiting_share']:.0%}  eta {eta}"
        )
        self.scalars(step, values)

    def count_bad(self) -> int:
        """All updates of the run that were left out, those since the last row included."""
        return self.bad_steps + int(sum(bad for _, bad, *_ in self.records))

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
        """Flush everything to disk."""
        if self.board is not None:
            self._write(lambda board: board.close())
        threading.excepthook = threading.__excepthook__

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        """Write on the main process; a full disk costs rows of the log, not the run."""
        if not self.world.is_main:
            return
        try:
            if self.board is None:
                folder = self.folder / "tensorboard"
                self.board = SummaryWriter(folder, purge_step=self.purge_step)
                self.purge_step = None
            write(self.board)
            self.is_writing = True
        except OSError as error:
            if self.is_writing:
                print(f"warning: the log is not written: {error}", file=sys.stderr, flush=True)
            self.is_writing, self.board = False, None

    def _collect(self) -> dict[str, float]:
        """Means over the steps since the last row and over all processes."""
        losses = [part for parts, *_ in self.records for part in parts]
        bad = torch.stack([bad for _, bad, *_ in self.records]).tolist()
        self.records.clear()
        for step, is_bad in enumerate(bad, 1 + self.logged_step):
            self._count_bad(step, bool(is_bad))
        plain = torch.cat([part.plain for part in losses]).tolist()
        names = ["loss"] * len(plain)
        if losses[0].quartiles is not None:
            quartiles = torch.cat([part.quartiles for part in losses])
            names = [f"loss_q{quartile + 1}" for quartile in quartiles.tolist()]
        sums, counts = Counter(), Counter()
        for name, value in zip(names, plain, strict=True):
            if math.isfinite(value):
                sums[name] += value
                counts[name] += 1
        hidden = sum((Counter(part.hidden) for part in losses), Counter())
        gathered = self.world.gather((sums, counts, hidden, self.skipped - self.named))
        *totals, skipped = zip(*gathered, strict=True)
        sums, counts, hidden = (sum(parts, Counter()) for parts in totals)
        for error in sorted(set().union(*skipped)):
            self.world.print(f"warning: skipped {error}")
            self.named.add(error)
        return {
            "num_steps": len(bad),
            "loss": sum(sums.values()) / counts.total() if counts else math.nan,
            **{name: sums[name] / counts[name] for name in sorted(sums) if name != "loss"},
            **{f"hidden_{name}": hidden[name] for name in losses[0].hidden},
            "bad_steps": self.bad_steps,
            "data/skipped": len(self.named),
        }

    def _count_bad(self, step: int, bad: bool) -> None:
        if not bad:
            self.bad_in_row = 0
            return
        self.bad_in_row += 1
        self.bad_steps += 1
        self.worst_row = max(self.worst_row, (self.bad_in_row, step + 1 - self.bad_in_row))
        first = (step - 1) * self.config.batch_size
        self.world.print(
            f"step {step}: loss or gradient is not finite, update left out (samples {first} to "
            f"{first + self.config.batch_size - 1}; {self.bad_in_row} in a row)"
        )

    def _stop_clock(self) -> None:
        now = time.monotonic()
        self.busy_s += now - self.since
        self.since = now

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


def _pass_over_writer(args: threading.ExceptHookArgs) -> None:
    """No traceback when TensorBoard's thread cannot write: the next call here reports it."""
    of_writer = type(args.thread).__module__.startswith("tensorboard.")
    if not (of_writer and issubclass(args.exc_type, OSError)):
        threading.__excepthook__(args)


def _append(path: Path, line: str) -> None:
    """Add a whole line or nothing."""
    file = path.open("a")
    end = file.tell()
    try:
        with file:
            file.write(line)
    except OSError:  # cut once it is closed, which tries to write the rest of the line
        os.truncate(path, end)
        raise


def _cut_lines(path: Path, steps_done: int) -> None:
    """Keep the lines of the steps done. Later lines are dropped, as is a last one cut short by a
    kill; other unreadable lines are set aside."""
    content = path.read_bytes() if path.exists() else b""
    kept, damaged = [], []
    for line in (lines := content.split(b"\n")):
        try:
            if json.loads(line)["step"] <= steps_done:
                kept.append(line + b"\n")
        except (ValueError, LookupError, TypeError, RecursionError):
            if line is not lines[-1]:  # which has no end
                damaged.append(line + b"\n")
    if damaged:
        place = path.with_name("metrics.damaged.jsonl")
        with place.open("ab") as file:
            file.writelines(damaged)
        print(f"warning: {path}: set aside {len(damaged)} unreadable lines in {place}", flush=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(kept))
