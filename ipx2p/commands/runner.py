"""Several trainings at a time, each in its own process, and how long they take (layer 5)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ipx2p.distributed import count_cores, end_with_parent
from ipx2p.errors import InputError

POLL_S = 0.5
SAY_S = 30.0  # between lines about all runs
LAST_WORDS = 500  # characters of a failed run that are shown


@dataclass(frozen=True)
class Job:
    """A run: its folder, settings, number of steps, and whether nothing is left to do."""

    folder: Path
    config: Path
    steps: int
    is_done: bool

    @property
    def log(self) -> Path:
        return self.config.with_suffix(".log")

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "ipx2p", "train", str(self.config), "train.processes=1"]

    @property
    def steps_done(self) -> int:
        """As its log of numbers says."""
        if self.is_done:
            return self.steps
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                return min(self.steps, int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):  # half written, or of something else
                continue
        return 0


class Progress:
    """What is done of several runs, and how long the rest takes at the pace of this session."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.total = sum(job.steps for job in jobs)
        self.first = sum(job.steps_done for job in jobs)
        self.started_at = self.said_at = time.monotonic()

    def line(self, num_finished: int) -> str:
        """In words."""
        steps, elapsed_s = sum(job.steps_done for job in self.jobs), time.monotonic()
        elapsed_s -= self.started_at
        told = f"{num_finished} of {len(self.jobs)} runs finished, {steps} of {self.total} steps"
        if steps > self.first:
            left_s = elapsed_s * (self.total - steps) / (steps - self.first)
            told += f"; {duration(elapsed_s)} so far, about {duration(left_s)} left"
        return told


def duration(seconds: float) -> str:
    """Short, for a person."""
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def run_jobs(jobs: Sequence[Job], processes: int | None) -> None:
    """Run what is not done, some at a time; a signal stops them all at a checkpoint.

    Args:
        processes: at a time; None: one for each GPU, else for each core.
    Raises: InputError if runs failed, when the others are finished.
    """
    waiting = [job for job in jobs if not job.is_done]
    if not waiting:
        print(f"all {len(jobs)} runs are finished")
        return
    cores = count_cores()
    count = min(processes or torch.cuda.device_count() or cores, len(waiting))
    free = [*range(count)]
    progress, failed = Progress(jobs), []
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
    print(progress.line(len(jobs) - len(waiting)) + f"; {count} at a time", flush=True)
    with _stopping(running):
        while waiting or running:
            while waiting and free:
                slot, job = free.pop(0), waiting.pop(0)
                running[slot] = (job, start(job, slot, max(1, cores // count)), time.monotonic())
            time.sleep(POLL_S)
            for slot, (job, process, since) in [*running.items()]:
                if process.poll() is None:
                    continue
                del running[slot]
                free.append(slot)
                took = duration(time.monotonic() - since)
                if process.returncode:
                    failed.append(job)
                told = f"failed, see {job.log}" if process.returncode else f"finished in {took}"
                print(f"{job.folder}: {told}", flush=True)
                progress.said_at -= SAY_S  # say it now
            if time.monotonic() - progress.said_at >= SAY_S and (waiting or running):
                num_finished = len(jobs) - len(waiting) - len(running) - len(failed)
                print(progress.line(num_finished), flush=True)
                progress.said_at = time.monotonic()
    if failed:
        words = failed[0].log.read_text(encoding="utf-8", errors="replace").strip()
        raise InputError(
            f"{len(failed)} of {len(jobs)} runs failed; {failed[0].folder}: "
            f"{words.splitlines()[-1][-LAST_WORDS:] if words else 'without a word'}"
        )


def start(job: Job, slot: int, threads: int) -> subprocess.Popen:
    """Start a run; what it prints goes to its log."""
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if torch.cuda.device_count() > 1:
        device = str(slot % torch.cuda.device_count())
        environment = {"CUDA_VISIBLE_DEVICES": device, **environment}
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            job.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes once, from `_stopping`
            preexec_fn=end_with_parent,
        )


@contextmanager
def _stopping(running: dict[int, tuple[Job, subprocess.Popen, float]]):
    """Pass SIGTERM and Ctrl-C on to the runs, and wait for their checkpoints."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        for _, process, _ in running.values():
            process.send_signal(signal.SIGTERM)
        for _, process, _ in running.values():
            process.wait()
        print("stopped; run the same command to resume", flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, earlier)
