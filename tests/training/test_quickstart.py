"""The first command of the README: what it promises, killed in the middle."""

import csv
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
    """Start the quickstart in `tmp_path`; what it prints is in `log`."""
    for name in ("assets", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)

    def start(log):
        command = [sys.executable, str(ROOT / "train.py"), "configs/quickstart.yaml"]
        with (tmp_path / log).open("w") as file:
            return subprocess.Popen(
                command, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    return start


@pytest.mark.slow
def test_quickstart_survives_a_kill_and_draws_cartoons_of_unseen_photographs(tmp_path, start):
    run = tmp_path / "runs" / "quickstart"
    first = start("first.txt")
    while not find_checkpoints(run):
        assert first.poll() is None, (tmp_path / "first.txt").read_text()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()

    assert start("second.txt").wait() == 0, (tmp_path / "second.txt").read_text()
    assert "resuming from" in (tmp_path / "second.txt").read_text()
    with (run / "evaluation" / "table.csv").open() as file:
        rows = {(row["task"], row["model"]): row for row in csv.DictReader(file)}
    psnr = {name: float(row["psnr"]) for name, row in rows.items() if row["psnr"]}
    assert psnr["cartoonize", "tuned"] > psnr["cartoonize", "base"] + 0.6
    assert psnr["cartoonize", "tuned"] > psnr["cartoonize", "identity"] + 1
    for task in ("denoise", "enhance", "derain"):
        assert psnr[task, "tuned"] > psnr[task, "identity"] + 1
    for task in ("denoise", "enhance", "derain", "deblur"):
        assert psnr[task, "tuned"] > psnr[task, "base"] - 1.2

    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert start("third.txt").wait() == 0
    assert "is finished" in (tmp_path / "third.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
