"""Runs that are killed with -9, whatever they are doing, end like runs that are not."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.training.conftest import YAML, assert_same_run

KILLS = 10
SETTINGS = ("train.steps=120", "train.checkpoint_every=3", "validation.every=7",
            "validation.pairs_per_task=1", "data.workers=1", "data.draws=2")  # fmt: skip


def start(folder, name):
    """A run in a process group of its own, which prints into NAME.txt."""
    command = [sys.executable, "train.py", folder / "config.yaml", f"run.dir={folder}"]
    with (folder / f"{name}.txt").open("a") as log:
        return subprocess.Popen(
            [*command, f"run.name={name}", *SETTINGS],
            cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def wait_for(process, happened):
    while not happened() and process.poll() is None:
        time.sleep(0.001)


def steps_printed(log, begun):
    return log.read_text()[begun:].count("\nstep ")


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML)
    moments = random.Random(0)
    run, log = tmp_path / "killed", tmp_path / "killed.txt"
    writing = 0
    for kill in range(KILLS):
        process = start(tmp_path, "killed")
        begun = log.stat().st_size
        steps = 3 if kill % 2 else moments.randrange(12)
        wait_for(process, lambda: steps_printed(log, begun) >= steps)  # noqa: B023
        if kill % 2:  # while a checkpoint is written
            wait_for(process, lambda: any((run / "checkpoints").glob(".step_*")))
        time.sleep(moments.uniform(0, 0.05))
        writing += any((run / "checkpoints").glob(".step_*"))
        assert process.poll() is None, log.read_text()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert writing > 0
    assert start(tmp_path, "killed").wait() == 0, log.read_text()
    out = log.read_text()
    assert "Traceback" not in out and "damaged" not in out and out.count("resuming from") > 3
    assert start(tmp_path, "whole").wait() == 0
    assert_same_run(run, tmp_path / "whole")
