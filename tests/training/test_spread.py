"""Runs whose processes the command starts itself: `train.processes`, without torchrun."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from ipx2p.distributed import spread
from ipx2p.training.config import StepsConfig
from tests.conftest import ROOT
from tests.training.conftest import assert_same_run
from tests.training.test_distributed import SHORT, launch  # noqa: F401, a fixture

TWO = (*SHORT, "train.processes=2")
MANY_S = 60.0


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def begun(launch, *overrides):  # noqa: F811
    """A run after its second step, and its other process."""
    process = launch.start("run", 1, *TWO, "train.batch_size=8", *overrides)
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    (other,) = children_of(process.pid)
    return process, other


def is_gone(pid: int) -> bool:
    until = time.monotonic() + MANY_S
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        time.sleep(0.05)
    return not os.path.exists(f"/proc/{pid}")


@pytest.mark.slow
def test_they_train_as_those_of_torchrun_and_one_of_them_prints(launch):  # noqa: F811
    code, out, own = launch("own", 1, *TWO)
    assert code == 0 and out.count("eta") == 20 and "on 2 x cpu" in out, out
    _, _, other = launch("other", 2, *SHORT)
    assert_same_run(own, other)


@pytest.mark.slow
def test_a_signal_to_the_first_stops_both_and_the_same_command_resumes(launch):  # noqa: F811
    process, other = begun(launch)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=MANY_S)
    assert process.returncode == 0 and "stopped after step" in out and is_gone(other), out
    code, out, stopped = launch("run", 1, *TWO, "train.batch_size=8")
    assert code == 0 and "resuming from" in out, out
    _, _, whole = launch("whole", 1, *TWO, "train.batch_size=8")
    assert_same_run(stopped, whole)


@pytest.mark.slow
def test_a_killed_first_process_takes_the_other_with_it(launch):  # noqa: F811
    process, other = begun(launch, "train.steps=100000")
    process.kill()
    process.wait()
    assert is_gone(other)


@pytest.mark.slow
def test_a_killed_other_process_ends_the_run_with_one_line(launch):  # noqa: F811
    process, other = begun(launch, "train.steps=100000")
    os.kill(other, signal.SIGKILL)
    out, _ = process.communicate(timeout=MANY_S)
    assert process.returncode == 2, out
    assert re.search(r"^error: rank 1 ended with exit code -9$", out, re.MULTILINE), out


def test_what_all_of_them_refuse_is_said_once(launch):  # noqa: F811
    code, out, _ = launch("odd", 1, *TWO, "train.batch_size=3")
    assert code == 2 and out.count("error: ") == 1, out
    assert "train.batch_size is 3, expected a multiple of 2: 2 processes" in out


FIRST = """
import sys
from ipx2p.cli import run_command
from ipx2p.distributed import open_world, spread

def main():
    with spread([sys.executable, "-c", OTHER], 2), open_world(cuda=False) as world:
        world.barrier()
        world.barrier()

run_command(main)
"""


@pytest.mark.parametrize(
    ("other", "said", "shown"),
    [
        pytest.param(
            "sys.exit('error: rank 1: file 7 is damaged')",
            "rank 1: file 7 is damaged",
            False,
            id="refuses",
        ),
        pytest.param(
            "world.barrier(); raise KeyError('mine')",
            "rank 1 ended with exit code 1",
            True,
            id="crashes",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sys.exit()",
            "rank 0: another process of this run has ended, see its message",
            False,
            id="leaves",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            None,
            "rank 1 ended with exit code 3",
            False,
            id="never-comes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_one_of_them_says_is_reported_by_the_first(other, said, shown):
    head = "import sys\nfrom ipx2p.distributed import open_world\n"
    code = "import os; os._exit(3)"  # before it has met the first
    if other is not None:
        code = f"{head}with open_world(cuda=False) as world: {other}"
    script = f"OTHER = {code!r}\n{FIRST}"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=MANY_S
    )
    assert result.returncode == 2 and result.stderr.splitlines()[-1] == f"error: {said}"
    assert ("KeyError: 'mine'" in result.stderr) is shown
    assert shown or len(result.stderr.splitlines()) == 1, result.stderr


def test_one_process_and_those_of_torchrun_start_no_others(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with spread(["/no/such/program"], 2):
        pass
    monkeypatch.delenv("RANK")
    with spread(["/no/such/program"], 1):
        pass


def test_no_more_are_started_than_there_are_gpus(monkeypatch):
    several = StepsConfig(steps=1, processes=4, device="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert several.num_processes == 2 and replace(several, device="cpu").num_processes == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert several.num_processes == 4
