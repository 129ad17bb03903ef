"""Runs of several processes, started as people start them: with torchrun, over gloo."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from ipx2p.training.checkpoint import find_checkpoints
from tests.conftest import ROOT
from tests.training.conftest import YAML

STEPS = 20


@pytest.fixture
def launch(tmp_path):
    """Train in processes of one thread each; returns exit code, output and the run's folder."""
    (tmp_path / "config.yaml").write_text(YAML)

    def launch(name, processes, *overrides, script=ROOT / "train.py"):
        run = [
            str(script),
            str(tmp_path / "config.yaml"),
            f"run.dir={tmp_path}",
            f"run.name={name}",
        ]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [sys.executable, *(torchrun if processes > 1 else []), *run, *overrides],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr, tmp_path / name

    return launch


def newest_tensors(run):
    newest = find_checkpoints(run)[-1]
    return {
        (path.relative_to(newest), key): tensor
        for path in sorted(newest.rglob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_two_processes_equal_one_with_twice_the_micro_batches(launch):
    steps = (f"train.steps={STEPS}", "train.batch_size=4", "train.checkpoint_every=20")
    code, out, two = launch("two", 2, *steps)
    assert code == 0, out
    assert out.count("eta") == STEPS and "on 2 x cpu" in out
    code, out, one = launch("one", 1, *steps, "train.accumulate=2")
    assert code == 0, out
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    two, one = newest_tensors(two), newest_tensors(one)
    assert two.keys() == one.keys()
    assert [key for key, tensor in two.items() if not tensor.equal(one[key])] == []
