"""The first command of the README: what it promises, killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ipx2p.training.checkpoint import find_checkpoints
from tests.conftest import ROOT


@pytest.fixture
def start(tmp_path):
    """Start the quickstart with its runs below `tmp_path`; what it prints is in `log`."""

    def start(log):
        command = [sys.executable, "train.py", "configs/quickstart.yaml", f"run.dir={tmp_path}"]
        with (tmp_path / log).open("w") as file:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    return start


@pytest.mark.slow
def test_quickstart_survives_a_kill_and_brightens_unseen_photographs(tmp_path, start):
    run = tmp_path / "quickstart"
    first = start("first.txt")
    while not find_checkpoints(run):
        assert first.poll() is None, (tmp_path / "first.txt").read_text()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()

    assert start("second.txt").wait() == 0, (tmp_path / "second.txt").read_text()
    assert "resuming from" in (tmp_path / "second.txt").read_text()
    sheet = sorted((run / "samples").glob("*.png"))[-1]
    scores = json.loads(sheet.with_suffix(".json").read_text())["scores"]
    gains = {score["task"]: score["psnr_edit"] - score["psnr_input"] for score in scores}
    assert gains["enhance"] >= 3 and gains["denoise"] >= 0.5

    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert start("third.txt").wait() == 0
    assert "is finished" in (tmp_path / "third.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
