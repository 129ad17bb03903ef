"""What a run says about itself: a line of text now and then, and TensorBoard (layer 4)."""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ipx2p.training.config import StepsConfig
from ipx2p.training.validation import Report


class Monitor:
    """Averages losses, measures the time of steps alone, and writes both.

    Args:
        folder: of the run.
        steps_done: before this process.
    """

    def __init__(self, folder: Path, config: StepsConfig, *, steps_done: int) -> None:
        self.num_steps = config.steps
        self.batch_size = config.batch_size
        self.log_every = config.log_every
        # What was written after the last checkpoint will be written again.
        self.board = SummaryWriter(folder / "tensorboard", purge_step=steps_done + 1)
        self.steps_done = self.logged_step = steps_done
        self.losses: list[Tensor] = []
        self.busy_s = self.logged_busy_s = 0.0
        self.resume()

    def resume(self) -> None:
        """Start the clock of the next step; what came before it is no part of it."""
        self.since = time.monotonic()

    def step(self, step: int, losses: Tensor, learning_rate: float, grad_norm: Tensor) -> None:
        """Note one finished step, counted from 1; every `log_every` steps, say so."""
        self.losses.append(losses.detach().mean())
        if step % self.log_every == 0 or step == self.num_steps:
            loss = torch.stack(self.losses).mean().item()  # waits for the device
            self.losses.clear()
            self._count_time()
            self._log(step, loss, learning_rate, grad_norm.item())
        else:
            self._count_time()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write numbers to TensorBoard."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def report(self, step: int, report: Report) -> None:
        """Write a validation to TensorBoard."""
        self.scalars(step, report.scalars())
        self.board.add_image("samples", np.asarray(report.sheet), step, dataformats="HWC")
        self.board.flush()

    def close(self) -> None:
        """Flush what is not yet on disk."""
        self.board.close()

    def _count_time(self) -> None:
        now = time.monotonic()
        self.busy_s += now - self.since
        self.since = now

    def _log(self, step: int, loss: float, learning_rate: float, grad_norm: float) -> None:
        num_samples = (step - self.logged_step) * self.batch_size
        rate = num_samples / (self.busy_s - self.logged_busy_s)
        step_s = self.busy_s / (step - self.steps_done)
        eta = _clock(step_s * (self.num_steps - step))
        print(
            f"step {step}/{self.num_steps}  loss {loss:.4f}  {rate:.1f} samples/s  eta {eta}",
            flush=True,
        )
        values = {
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "samples_per_s": rate,
            "samples_seen": step * self.batch_size,
        }
        self.scalars(step, values)
        self.logged_step, self.logged_busy_s = step, self.busy_s


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
