"""Runs of several processes, started as people start them: with torchrun, over gloo."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ipx2p.distributed import World, open_world
from ipx2p.errors import InputError
from tests.conftest import ROOT
from tests.training.conftest import YAML, assert_same_run

STEPS = 20
SHORT = ("train.batch_size=4", f"train.steps={STEPS}", f"train.checkpoint_every={STEPS}")
# A script that trains as train.py does, after the change that takes the place of CHANGE.
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import train
from ipx2p.cli import run_command
{change}
run_command(train.main)
"""


class Launch:
    """Starts training in processes of one thread each."""

    def __init__(self, folder):
        self.folder = folder
        self.config = folder / "config.yaml"
        self.config.write_text(YAML)

    def start(self, name, processes, *overrides, change=None, torchrun=()):
        script = ROOT / "train.py"
        if change is not None:
            script = self.folder / f"{name}.py"
            script.write_text(SCRIPT.format(root=str(ROOT), change=change))
        several = ["-m", "torch.distributed.run", *torchrun, "--nproc-per-node", str(processes)]
        run = [script, self.config, f"run.dir={self.folder}", f"run.name={name}"]
        return subprocess.Popen(
            [sys.executable, *(several if processes > 1 else []), *run, *overrides],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *args, **options):
        """Exit code, output and the run's folder."""
        process = self.start(*args, **options)
        try:
            out, _ = process.communicate(timeout=240)
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        return process.returncode, out, self.folder / args[0]


@pytest.fixture
def launch(tmp_path):
    return Launch(tmp_path)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("data.draws=2", "data.cache=true")], ids=["", "cached"])
def test_two_processes_equal_one_with_twice_the_micro_batches(launch, tmp_path, extra):
    extra = (*SHORT, *extra, f"data.cache_dir={tmp_path / 'cache'}")
    code, out, two = launch("two", 2, *extra)
    assert code == 0, out
    assert out.count("eta") == STEPS and "on 2 x cpu" in out  # one of them prints
    code, out, one = launch("one", 1, *extra, "train.accumulate=2")
    assert code == 0, out
    assert "encoding pairs" not in out
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert_same_run(two, one)
    for report in (two / "samples").glob("*.json"):
        report.unlink()
    code, out, _ = launch("two", 2, *extra, "validation.every=4")
    assert code == 0 and "eta" not in out and "VAE ceiling" in out, out  # made up for, by both


@pytest.mark.slow
def test_more_micro_batches_of_more_processes_are_the_same_step(launch):
    """Gradients are then added in another order, so the last bits may differ."""
    _, _, many = launch("many", 2, *SHORT, "train.batch_size=8", "train.accumulate=2")
    _, _, one = launch("one", 1, *SHORT, "train.batch_size=8")
    assert losses(many) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.slow
@pytest.mark.slow
def test_gradients_travel_once_a_step_in_four_bytes_a_parameter(launch):
    """What docs/scaling.md reckons with, counted by a hook that gets every bucket."""
    change = """
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from ipx2p.training import loop
prepare = loop.prepare
def counting(*args):
    network = prepare(*args)
    def exchange(group, bucket):
        print(f"EXCHANGED {bucket.buffer().nbytes} bytes", flush=True)
        return default_hooks.allreduce_hook(group, bucket)
    network.register_comm_hook(None, exchange)
    return network
loop.prepare = counting
"""
    steps, processes = 3, 2
    short = ("train.batch_size=8", "train.accumulate=2", f"train.steps={steps}")
    code, out, run = launch("counted", processes, *short, "validation.every=9", change=change)
    assert code == 0, out
    weights = load_file(run / "weights" / "unet" / "diffusion_pytorch_model.safetensors")
    sent = sum(map(int, re.findall(r"EXCHANGED (\d+) bytes", out)))
    assert sent == 4 * sum(map(torch.numel, weights.values())) * steps * processes


def test_a_broken_pair_is_named_once_and_counted_whichever_process_meets_it(launch, tmp_path):
    for name in ("good", "bad"):
        Image.new("RGB", (40, 40), "teal").save(tmp_path / f"{name}.png")
    line = {"source": "good.png", "target": "good.png", "instruction": "x", "task": "derain"}
    (tmp_path / "val.jsonl").write_text(json.dumps(line))
    bad = [line | {"source": "bad.png"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [line] * 2 + bad)))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code, out, run = launch(
        "skipping", 2, *SHORT, "data.photos=null", "data.held_out=[]", "data.on_error=skip",
        "data.instructions=per_step", f"data.manifest={tmp_path / 'train.jsonl'}",
        f"data.validation_manifest={tmp_path / 'val.jsonl'}",
    )  # fmt: skip
    assert code == 0 and len(re.findall(r"warning: skipped .*train\.jsonl line 3", out)) == 1, out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["data/skipped"] for line in lines if "loss" in line][-1] == 1


@pytest.mark.slow
def test_the_error_of_one_process_ends_all_with_its_message(launch, tmp_path):
    for name in ("good", "bad"):
        Image.new("RGB", (40, 40), "teal").save(tmp_path / f"{name}.png")
    line = {"source": "good.png", "target": "good.png", "instruction": "x", "task": "derain"}
    (tmp_path / "val.jsonl").write_text(json.dumps(line))
    lines = [line] * 7 + [line | {"source": "bad.png"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    since = time.monotonic()
    code, out, _ = launch(
        "bad", 2, *SHORT, "data.photos=null", "data.held_out=[]", "data.instructions=per_step",
        f"data.manifest={tmp_path / 'train.jsonl'}",
        f"data.validation_manifest={tmp_path / 'val.jsonl'}",
    )  # fmt: skip
    assert code != 0 and time.monotonic() - since < 60
    assert re.search(r"error: rank \d: .*train\.jsonl line 8: .*bad\.png: not a picture", out), out
    assert "Traceback" not in out.split("error: rank")[0]


@pytest.mark.slow
def test_a_process_that_crashes_ends_the_job_in_under_a_minute(launch):
    change = (
        "from ipx2p.training.learners import EditLearner\n"
        "losses = EditLearner.losses\n"
        "def broken(self, batch):\n"
        "    if os.environ['RANK'] == '1' and max(batch.indices) > 9: raise KeyError('a mistake')\n"
        "    return losses(self, batch)\n"
        "EditLearner.losses = broken\n"
    )
    since = time.monotonic()
    code, out, _ = launch("crash", 2, *SHORT, change=change)
    assert code != 0 and time.monotonic() - since < 60
    assert "KeyError: 'a mistake'" in out and "rank 0: another process of this run has ended" in out


@pytest.mark.slow
def test_a_crash_ends_a_process_with_data_workers(launch):
    change = (
        "from ipx2p.training.ema import EMA\n"
        "def crash(*_): raise RuntimeError('out of memory')\n"
        "EMA.update = crash\n"
    )
    code, out, _ = launch("crash", 1, *SHORT, "data.workers=2", change=change)
    assert code == 1 and "RuntimeError: out of memory" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "sys.argv += ['optimizer.learning_rate=0.00' + os.environ['RANK'] + '1']",
            "the settings differs between processes: rank 0 has .*, rank 1 has ",
        ),
        (
            "import ipx2p.training.learners as learners, torch\n"
            "fresh = learners.fresh_network\n"
            "def changed(*args):\n"
            "    network = fresh(*args)\n"
            "    with torch.no_grad(): network.conv_in.bias[0] += float(os.environ['RANK'])\n"
            "    return network\n"
            "learners.fresh_network = changed\n",
            "the UNet at the start differs between processes",
        ),
        (
            "from ipx2p.training.ema import EMA\n"
            "update = EMA.update\n"
            "def changed(self, module, n, bad):\n"
            "    self.decay = 0.5 + 0.1 * float(os.environ['RANK'])\n"
            "    update(self, module, 9 + n, bad)\n"
            "EMA.update = changed\n",
            "step 20: its average differs between processes",
        ),
    ],
    ids=["settings", "weights", "average"],
)
def test_processes_that_disagree_are_told(launch, change, message):
    code, out, _ = launch("differ", 2, *SHORT, change=change)
    assert code != 0 and re.search(f"error: rank [01]: {message}", out), out


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_resumes_bitwise(launch, tmp_path):
    change = (
        "from ipx2p.training.ema import EMA\n"
        "import signal\n"
        "update = EMA.update\n"
        "def killed(self, module, n, bad):\n"
        "    update(self, module, n, bad)\n"
        "    if n == 7 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] "
        "== '0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "EMA.update = killed\n"
    )
    every = (*SHORT, "train.checkpoint_every=5")
    code, out, killed = launch("killed", 2, *every, change=change, torchrun=("--max-restarts", "1"))
    assert code == 0 and "resuming from" in out and "step_000005" in out, out
    _, _, whole = launch("whole", 2, *every)
    assert_same_run(killed, whole)


@pytest.mark.slow
def test_a_signal_to_all_processes_ends_them_in_order(launch):
    """As Slurm sends it: to every process, at some moment; what follows is the same run."""
    processes = 2
    every = (*SHORT, "train.batch_size=8", "validation.every=3", "data.workers=1")
    process = launch.start("stopped", processes, *every)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step 4/"):
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for pid in map(int, children.stdout.split()):
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)  # not all at the same moment
    printed.append(process.communicate(timeout=120)[0])
    out = "".join(printed)
    assert process.returncode == 0 and re.search(
        r"stopped after step \d+; run the same command", out
    )
    assert "Traceback" not in out
    code, out, stopped = launch("stopped", processes, *every)
    assert code == 0 and "resuming from" in out
    _, _, whole = launch("whole", processes, *every)
    assert_same_run(stopped, whole)


@pytest.mark.slow
def test_a_sigterm_to_torchrun_and_its_processes_writes_a_checkpoint(launch):
    """As `scancel` and `kill -TERM -GROUP` send it; torchrun forwards its own on top."""
    process = launch.start("stopped", 2, *SHORT, "train.steps=200", "train.checkpoint_every=200")
    for line in process.stdout:
        if line.startswith("step 4/"):
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for pid in [process.pid, *map(int, children.stdout.split())]:
        os.kill(pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    found = re.search(r"stopped after step (\d+); run the same command", out)
    assert found, out
    assert [*(launch.folder / "stopped" / "checkpoints").glob(f"step_*{found[1]}")]


def test_what_torchrun_did_not_set_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="start with torchrun, or set them all"):
        open_world(cuda=False).__enter__()
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(InputError, match="do not make sense: .*'RANK': '2', 'WORLD_SIZE': '2'"):
        open_world(cuda=False).__enter__()


def test_shares_of_a_list_are_merged_in_its_order(monkeypatch):
    items = [*range(7)]
    parts = [World(rank, 3).share(items) for rank in range(3)]
    monkeypatch.setattr(World, "gather", lambda self, value: parts)
    assert World(1, 3).merge(parts[1]) == items


def test_batches_that_cannot_be_dealt_evenly_are_refused(tmp_path):
    from ipx2p.training.config import StepsConfig
    from ipx2p.training.loop import check_batch

    with pytest.raises(InputError, match=r"batch_size is 10, expected a multiple of 6: 2 proc"):
        check_batch(StepsConfig(steps=1, batch_size=10, accumulate=3), World(0, 2))
