"""An interrupted run resumes bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

import ipx2p.data.cache
import ipx2p.training.checkpoint
from ipx2p.editing.editor import Editor
from ipx2p.errors import InputError
from ipx2p.files import read_json, write_json
from ipx2p.training.loop import train
from ipx2p.training.optimizer import Stepper
from tests.conftest import ROOT
from tests.training.conftest import QUICK_VAE, QUICK_WRAPPING, assert_same_run, forget

SLOW = pytest.mark.slow
CACHE = ("data.draws=2", "data.cache=true")
BF16 = ("train.precision=bfloat16", "train.batch_size=4", "train.accumulate=2")


@pytest.fixture
def cache(tmp_path):
    """Where a run of this test caches."""
    return f"data.cache_dir={tmp_path / 'cache'}"


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param((), id="edit"),
        pytest.param((*BF16, *CACHE), id="bf16-cached"),
        pytest.param(BF16, id="bf16", marks=SLOW),
        pytest.param(QUICK_VAE, id="autoencoder", marks=SLOW),
        pytest.param(QUICK_WRAPPING, id="wrapping"),
        pytest.param(
            ("train.recompute_activations=true", "train.channels_last=false"),
            id="recomputed",
            marks=SLOW,
        ),
    ],
)
def test_two_and_two_steps_equal_four_bitwise(make_config, run_folder, cache, extra):
    train(make_config(*extra, cache))
    whole = shutil.copytree(run_folder, run_folder.with_name("whole"), symlinks=True)
    forget(run_folder, 2)
    train(make_config(*extra, cache))
    assert_same_run(run_folder, whole)


def test_no_step_is_missing_from_the_log_of_a_killed_run(make_config, run_folder):
    def logged():
        rows = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["num_steps"]) for row in rows if "num_steps" in row]

    train(make_config("train.log_every=3"))
    assert logged() == [(2, 2), (3, 1), (4, 1)]  # a row at each checkpoint, too
    forget(run_folder, 2)
    train(make_config("train.log_every=3"))
    assert sum(num_steps for _, num_steps in logged()) == 4


@pytest.mark.slow
def test_the_point_of_an_epoch_does_not_matter(make_config, run_folder):
    """28 pairs, 12 a step: the epoch ends within the third step."""
    every = ("train.batch_size=12", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    train(make_config(*every))
    whole = shutil.copytree(run_folder, run_folder.with_name("whole"), symlinks=True)
    for step in (1, 2, 3):
        forget(run_folder, step)
        train(make_config(*every))
        assert_same_run(run_folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), CACHE], ids=["pictures", "cached"])
def test_a_new_process_resumes_bitwise(make_config, run_folder, tmp_path, cache, kind):
    extra = (*BF16, *kind, cache)
    train(make_config(*extra))
    whole = shutil.copytree(run_folder, run_folder.with_name("whole"), symlinks=True)
    forget(run_folder, 2)
    command = [sys.executable, "train.py", tmp_path / "config.yaml", f"run.dir={tmp_path / 'runs'}"]
    done = subprocess.run([*command, *extra], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "step_000002" in done.stdout, done.stdout + done.stderr
    assert_same_run(run_folder, whole)


# Signals


@pytest.fixture
def signal_when(monkeypatch):
    """Send this process a signal when a function of some owner is called for the n-th time."""

    def signal_when(owner, name, call, number=signal.SIGTERM):
        function, calls = getattr(owner, name), []

        def replaced(*args, **kwargs):
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, replaced)

    return signal_when


@pytest.mark.parametrize(
    ("number", "owner", "name", "call", "steps"),
    [
        pytest.param(signal.SIGTERM, Stepper, "__call__", 3, 3, id="step"),
        pytest.param(signal.SIGINT, Stepper, "__call__", 1, 1, id="interrupt", marks=SLOW),
        pytest.param(
            signal.SIGUSR1, ipx2p.training.checkpoint, "save_tensors", 1, 2, id="checkpoint"
        ),
        pytest.param(signal.SIGTERM, Editor, "edit", 1, 3, id="validation"),
    ],
)
def test_a_signal_ends_the_run_in_order_and_it_resumes_bitwise(
    make_config, run_folder, trained_once, signal_when, monkeypatch, capsys,
    number, owner, name, call, steps,
):  # fmt: skip
    signal_when(owner, name, call, number)
    train(make_config("train.log_every=2"))
    rows = (run_folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == steps
    out = capsys.readouterr().out
    assert f"{number.name}: stopping after this step" in out
    assert f"stopped after step {steps}; run the same command to resume" in out
    monkeypatch.undo()
    train(make_config())
    assert f"resuming from {run_folder / 'checkpoints' / f'step_{steps:06d}'}" in (
        capsys.readouterr().out
    )
    assert_same_run(run_folder, trained_once)


@pytest.mark.slow
def test_a_signal_while_encoding_keeps_what_is_done(
    make_config, run_folder, cache, tmp_path, signal_when, monkeypatch, capsys
):
    elsewhere = f"data.cache_dir={tmp_path / 'other'}"
    train(make_config(*CACHE, elsewhere, "run.name=whole"))
    signal_when(ipx2p.data.cache, "_encode", 5)
    train(make_config(*CACHE, cache))
    assert "stopped after step 0" in capsys.readouterr().out
    monkeypatch.undo()
    encoded = []
    encode = ipx2p.data.cache._encode
    monkeypatch.setattr(
        ipx2p.data.cache, "_encode", lambda *a, **k: encoded.append(1) or encode(*a, **k)
    )
    train(make_config(*CACHE, cache))
    assert len(encoded) == 2 * 38 - 5
    assert_same_run(run_folder, run_folder.with_name("whole"))


# What changed between two starts


def test_more_or_other_photographs_are_refused_and_named(make_config, finished_run, tmp_path):
    shutil.copytree(ROOT / "assets" / "photos", tmp_path / "photos")
    forget(finished_run, 2)
    config = finished_run / "config.yaml"
    config.write_text(config.read_text().replace(str(ROOT / "assets"), str(tmp_path)))
    photos = f"data.photos={tmp_path / 'photos'}"
    (tmp_path / "photos" / "bee.jpg").rename(tmp_path / "photos" / "wasp.jpg")
    with pytest.raises(
        InputError,
        match=r'the pairs are not those .*2 have other pictures, .* such as \["wasp\.jpg"',
    ):
        train(make_config(photos))
    (tmp_path / "photos" / "wasp.jpg").unlink()
    with pytest.raises(InputError, match="there were 38 pairs and are 36"):
        train(make_config(photos))


def test_a_manifest_that_changed_is_refused_with_what_changed(make_config, tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), "teal").save(tmp_path / f"{name}.png")
    line = {"source": "a.png", "target": "b.png", "instruction": "derain", "task": "derain"}
    manifest = tmp_path / "train.jsonl"
    config = make_config("data.photos=null", "data.held_out=[]", f"data.manifest={manifest}",
                         "data.instructions=per_step",
                         f"data.validation_manifest={tmp_path / 'val.jsonl'}")  # fmt: skip
    (tmp_path / "val.jsonl").write_text(json.dumps(line))
    lines = [json.dumps(line | {"instruction": f"derain {number}"}) for number in range(3)]
    manifest.write_text("\n".join(lines))
    train(config)
    run = tmp_path / "runs" / "test"
    forget(run, 2)
    before = (run / "config.yaml").read_bytes()
    for changed, message in (
        (
            [*lines[:2], lines[2].replace("2", "4")],
            r'1 have other pictures, .* such as .*"derain 4"',
        ),
        (lines[:2], "there were 3 pairs and are 2"),
        (lines[::-1], "their order differs"),
    ):
        manifest.write_text("\n".join(changed))
        with pytest.raises(InputError, match=f"the pairs are not those .*: {message}"):
            train(config)
    assert (run / "config.yaml").read_bytes() == before
    manifest.write_text("\n".join(lines))
    train(config)


def test_severities_may_change_for_tasks_that_a_run_does_not_learn(make_config, finished_run):
    forget(finished_run, 2)
    with pytest.raises(
        InputError, match=r"data\.degrade\.noise\.shot was .* and is \[0\.0, 0\.1\]"
    ):
        train(make_config("data.degrade.noise.shot=[0, 0.1]"))
    train(make_config("data.degrade.rain.drops=[1, 2]"))
    assert (finished_run / "checkpoints" / "step_000004").exists()


def test_another_number_of_processes_or_threads_resumes_and_says_what_is_lost(
    make_config, finished_run, capsys
):
    forget(finished_run, 2)
    state = finished_run / "checkpoints" / "step_000002" / "state.json"
    numbers = json.loads(state.read_text())
    threads = numbers["threads"]
    state.write_text(json.dumps(numbers | {"world_size": 2, "threads": threads + 1}))
    train(make_config("train.accumulate=3"))
    out = capsys.readouterr().out
    assert (
        "the weights will differ in their last bits: train.accumulate was 1 and is 3; there were 2 "
    )
    assert f"processes and are 1; there were {threads + 1} threads and are {threads}" in out
    assert "step 4/4" in out


def test_a_checkpoint_from_before_numbers_were_recorded_resumes(make_config, finished_run, capsys):
    forget(finished_run, 2)
    state = finished_run / "checkpoints" / "step_000002" / "state.json"
    numbers = json.loads(state.read_text())
    del numbers["threads"], numbers["bad_steps"]
    state.write_text(json.dumps(numbers))
    train(make_config())
    out = capsys.readouterr().out
    assert "step 4/4" in out and "last bits" not in out


def test_other_validation_settings_start_a_new_best(make_config, finished_run, capsys):
    forget(finished_run, 2)
    write_json({"step": 2, "score": 99.0}, finished_run / "best.json")
    train(make_config())
    assert read_json(finished_run / "best.json") == {"step": 2, "score": 99.0}
    forget(finished_run, 2)
    train(make_config("validation.pairs_per_task=1"))
    out = capsys.readouterr().out
    assert "validation.pairs_per_task was 2 and is 1: earlier scores do not compare" in out
    best = read_json(finished_run / "best.json")
    assert best["step"] == 4 and best["score"] < 99


def test_a_finished_run_is_validated_again_with_other_settings(make_config, finished_run, capsys):
    train(make_config("validation.pairs_per_task=1"))
    out = capsys.readouterr().out
    assert "validation.pairs_per_task was 2 and is 1" in out and "step 4/4" not in out
    scores = read_json(finished_run / "samples" / "step_000004.json")["scores"]
    assert [score["pairs"] for score in scores] == [1, 1]
    assert read_json(finished_run / "best.json")["step"] == 4
    train(make_config("validation.pairs_per_task=1"))
    assert "is finished" in capsys.readouterr().out
