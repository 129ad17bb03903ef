"""What a run says about itself: a line of text, JSON lines and TensorBoard (layer 4)."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ipx2p.devices import pick_dtype
from ipx2p.distributed import World
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
        self.bad_steps = self.bad_in_row = 0
        if world.is_main:
            # What was written after the last checkpoint will be written again.
            self.board = SummaryWriter(folder / "tensorboard", purge_step=steps_done + 1)
            self.lines = _open_lines(folder / "metrics.jsonl", steps_done)
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
        if not self.world.is_main:
            return
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.lines.write(json.dumps({"step": step, **values}) + "\n")
        self.lines.flush()

    def report(self, step: int, report: Report) -> None:
        """Write a validation."""
        self.scalars(step, report.scalars())
        if self.world.is_main:
            self.board.add_image("samples", np.asarray(report.sheet), step, dataformats="HWC")
            self.board.flush()

    def close(self) -> None:
        """Flush what is not yet on disk."""
        if self.world.is_main:
            self.board.close()
            self.lines.close()

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

        gathered = self.world.gather((sums, counts, hidden))
        sums = sum((part[0] for part in gathered), Counter())
        counts = sum((part[1] for part in gathered), Counter())
        hidden = sum((part[2] for part in gathered), Counter())
        return {
            "loss": sum(sums.values()) / max(1, counts.total()),
            **{name: sums[name] / counts[name] for name in sorted(sums) if name != "loss"},
            **{f"hidden_{name}": hidden[name] for name in losses[0].hidden},
            "bad_steps": self.bad_steps,
        }

    def _count_bad(self, step: int, bad: bool) -> None:
        self.bad_in_row = self.bad_in_row + 1 if bad else 0
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
        if self.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
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


def _open_lines(path: Path, steps_done: int):
    """The file, open to go on after the lines of `steps_done`; later and broken ones are cut."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= steps_done:
                    kept.append(line)
            except (ValueError, KeyError):
                break  # the process was killed while it wrote this one
    file = path.open("w")
    file.writelines(f"{line}\n" for line in kept)
    return file


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
