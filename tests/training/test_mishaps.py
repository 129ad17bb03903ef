"""What happens to long runs: updates that diverge, full disks, and who is told."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

import ipx2p.training.checkpoint
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.training.checkpoint import find_checkpoints
from ipx2p.training.ema import EMA
from ipx2p.training.learners import EditLearner
from ipx2p.training.loop import train, warnings, weights_hash
from ipx2p.training.optimizer import Stepper
from tests.conftest import ROOT
from tests.training.conftest import all_tensors, assert_same_run, forget


@pytest.fixture
def spoil(monkeypatch):
    """Make the loss of some samples infinite, or only its gradient."""

    def spoil(bad, *, gradient_only=False):
        losses = EditLearner.losses

        def replaced(learner, batch):
            result = losses(learner, batch)
            if bad.intersection(batch.indices):
                if gradient_only:
                    result.weighted.register_hook(lambda grad: grad * float("inf"))
                else:
                    result.weighted.data[0] = float("nan")
                    result.plain[0] = float("nan")
            return result

        monkeypatch.setattr(EditLearner, "losses", replaced)

    return spoil


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("gradient_only", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_update_that_is_not_finite_changes_nothing_and_is_not_saved(
    make_config, run_folder, spoil, capsys, monkeypatch, gradient_only
):
    update, states = EMA.update, []

    def watched(average, module, *args):
        update(average, module, *args)
        states.append((weights_hash(module), weights_hash(average.module)))

    monkeypatch.setattr(EMA, "update", watched)
    spoil({4}, gradient_only=gradient_only)  # of step 2
    train(make_config("train.checkpoint_every=2", "train.keep_checkpoints=9", "validation.every=9"))
    assert states[0] == states[1] != states[2]
    names = [path.name for path in find_checkpoints(run_folder)]
    assert names == ["step_000003", "step_000004"]  # after the next good update
    out = capsys.readouterr().out
    assert "step 2: loss or gradient is not finite, update left out (samples 3 to 5; 1 in" in out
    assert [line["bad_steps"] for line in lines(run_folder) if "loss" in line] == [0, 1, 1, 1]
    tensors = all_tensors(run_folder)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["optimizer.safetensors:conv_in.bias.step"] == 3


def test_too_many_of_them_end_the_run_with_the_last_good_checkpoint(make_config, run_folder, spoil):
    spoil({*range(6, 99)})
    with pytest.raises(
        InputError, match=r"2 updates in a row were left out.*step_000002: start another"
    ):
        train(make_config("train.max_bad_steps=2", "train.steps=9", "validation.every=9"))
    assert [path.name for path in find_checkpoints(run_folder)] == ["step_000002"]


def test_the_last_checkpoint_before_a_row_of_them_is_named(make_config, run_folder, spoil):
    spoil({*range(9, 15)})  # of steps 4 and 5, seen at step 6, whose checkpoint is not written
    with pytest.raises(
        InputError, match=r"2 updates in a row were left out.*step_000003: start another"
    ):
        train(make_config("train.max_bad_steps=2", "train.log_every=7", "train.steps=7",
                          "train.checkpoint_every=3", "validation.every=9"))  # fmt: skip
    names = [path.name for path in find_checkpoints(run_folder)]
    assert names == ["step_000003"]


def test_a_stop_after_bad_updates_resumes_before_them_and_counts_on(
    make_config, run_folder, spoil, monkeypatch, capsys
):
    spoil({3, *range(9, 18)})  # of step 2, and of 4 to 6
    step, calls = Stepper.__call__, []

    def stopping(stepper, *args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(stepper, *args)

    monkeypatch.setattr(Stepper, "__call__", stopping)
    overrides = ("train.steps=7", "train.checkpoint_every=1", "validation.every=9")
    train(make_config(*overrides))
    out = capsys.readouterr().out
    assert "stopped after step 5; run the same command to resume" in out
    assert "was left out: it resumes from step 3" in out
    assert find_checkpoints(run_folder)[-1].name == "step_000003"
    train(make_config(*overrides))
    rows = [line for line in lines(run_folder) if "loss" in line]
    assert [row["bad_steps"] for row in rows] == [0, 1, 1, 2, 3, 4, 4]


def test_weights_that_are_not_finite_do_not_replace_good_ones(make_config, run_folder, monkeypatch):
    update = EMA.update

    def diverge(average, module, step, bad):
        if step == 4:
            module.conv_out.bias.data[0] = float("nan")
        update(average, module, step, bad)

    monkeypatch.setattr(EMA, "update", diverge)
    with pytest.raises(InputError, match=r"no longer finite at step 4.*step_000002: start another"):
        train(make_config("validation.every=9"))
    assert [path.name for path in find_checkpoints(run_folder)] == ["step_000002"]


def test_a_long_row_of_them_is_noticed_at_the_next_log(make_config, spoil):
    spoil({*range(3, 9)})  # of steps 2 and 3
    with pytest.raises(InputError, match="2 updates in a row were left out"):
        train(make_config("train.max_bad_steps=2", "train.log_every=4", "validation.every=9"))


def test_a_loss_that_is_never_finite_is_not_logged_as_zero(make_config, run_folder, spoil, capsys):
    spoil({*range(99)})
    with pytest.raises(
        InputError, match=r"the last updates of the run \(4\) were left out; no check"
    ):
        train(make_config("train.batch_size=1", "validation.every=9"))
    assert find_checkpoints(run_folder) == []
    assert "step 1/4  loss nan" in capsys.readouterr().out
    assert lines(run_folder)[0]["loss"] is None


def test_sums_over_processes_are_rounded_and_still_judged_right(monkeypatch, make_config, capsys):
    monkeypatch.setattr(World, "mean", lambda self, value: value * 0.9999999)
    train(make_config("validation.every=9"))
    assert "left out" not in capsys.readouterr().out


# Disks


@pytest.fixture
def fail_to_save(monkeypatch):
    """Let some of the checkpoints fail, counted from 1, as on a full disk."""

    def fail_to_save(*numbers):
        save, calls = ipx2p.training.checkpoint.save_checkpoint, []

        def replaced(run, step, **arguments):
            calls.append(step)
            if len(calls) in numbers:
                (run / "checkpoints" / f".step_{step:06d}" / "weights").mkdir(parents=True)
                raise OSError(28, "No space left on device")
            return save(run, step, **arguments)

        monkeypatch.setattr(ipx2p.training.checkpoint, "save_checkpoint", replaced)

    return fail_to_save


def test_a_checkpoint_that_failed_is_reported_and_the_next_one_makes_up_for_it(
    make_config, run_folder, trained_once, fail_to_save, capsys
):
    fail_to_save(1)
    train(make_config())
    assert "warning: checkpoint of step 2 was not written: " in capsys.readouterr().err
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["step_000004"]
    assert_same_run(run_folder, trained_once)


@pytest.mark.slow
def test_a_last_checkpoint_that_failed_ends_the_run_with_an_error(
    make_config, run_folder, trained_once, fail_to_save, monkeypatch
):
    fail_to_save(2)
    with pytest.raises(InputError, match="checkpoint of step 4 was not written.*No space left"):
        train(make_config())
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["step_000002"]
    monkeypatch.undo()
    train(make_config())
    assert_same_run(run_folder, trained_once)


@pytest.mark.slow
def test_a_limit_on_file_sizes_leaves_earlier_checkpoints_and_a_non_zero_exit(
    make_config, run_folder, trained_once, tmp_path
):
    train(make_config("train.steps=2", "optimizer.schedule=constant"))
    earlier = {p: p.read_bytes() for p in find_checkpoints(run_folder)[0].rglob("*") if p.is_file()}
    command = [sys.executable, "train.py", tmp_path / "config.yaml", "optimizer.schedule=constant",
               f"run.dir={tmp_path / 'runs'}"]  # fmt: skip

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "File too large" in done.stderr, done.stdout + done.stderr
    assert "checkpoint of step 4 was not written" in done.stderr and "Trace" not in done.stderr
    assert {path: path.read_bytes() for path in earlier} == earlier
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["step_000002"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert find_checkpoints(run_folder)[-1].name == "step_000004"


@pytest.mark.slow
def test_a_log_that_cannot_be_written_costs_no_run(make_config, run_folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ipx2p.training.monitor._append", full)
    train(make_config())
    assert "warning: the log is not written: [Errno 28]" in capsys.readouterr().err
    assert find_checkpoints(run_folder)[-1].name == "step_000004"


# Checkpoints


def test_a_checkpoint_written_in_the_background_is_the_same(
    make_config, run_folder, trained_once, monkeypatch
):
    saver = ipx2p.training.checkpoint.CheckpointSaver.__init__

    def in_background(self, *args, **options):
        saver(self, *args, **options | {"background": True})

    monkeypatch.setattr(ipx2p.training.checkpoint.CheckpointSaver, "__init__", in_background)
    train(make_config())
    assert_same_run(run_folder, trained_once)
    assert (run_folder / "weights").resolve().parent == find_checkpoints(run_folder)[-1]


@pytest.mark.slow
def test_the_best_and_every_so_many_checkpoints_stay(make_config, run_folder, monkeypatch):
    from ipx2p.training.validation import Report

    qualities = iter([1.0, 9.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(Report, "quality", lambda report: next(qualities))
    train(make_config("train.steps=8", "train.checkpoint_every=1", "validation.every=1",
                      "train.keep_checkpoints=1", "train.keep_every=3"))  # fmt: skip
    names = ["step_000002", "step_000003", "step_000006", "step_000008"]
    assert [path.name for path in find_checkpoints(run_folder)] == names
    assert os.readlink(run_folder / "best") == "checkpoints/step_000002"
    assert json.loads((run_folder / "best.json").read_text()) == {"step": 2, "score": 9.0}


# What a run says


def test_the_log_holds_every_number_once(make_config, run_folder):
    train(make_config("train.checkpoint_every=1", "train.keep_checkpoints=9"))
    whole = lines(run_folder)
    forget(run_folder, 2)
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "los')  # a kill cut it short
    train(make_config("train.checkpoint_every=1", "train.keep_checkpoints=9"))
    again = lines(run_folder)
    assert (
        [line["step"] for line in again] == [line["step"] for line in whole] == [1, 2, 3, 3, 4, 4]
    )
    numbers = {"loss", "grad_norm", "learning_rate", "samples_per_s", "step_s", "waiting_share",
               "num_steps", "samples_seen", "hidden_text", "hidden_image", "hidden_both",
               "bad_steps", "memory_gib"}  # fmt: skip
    assert numbers <= whole[0].keys()
    assert any(name.startswith("loss_q") for name in whole[0])
    fixed = {f"validation_loss_q{quartile}" for quartile in (1, 2, 3, 4)}
    kinds = ("psnr_input", "psnr_edit", "psnr_edit_raw", "psnr_edit_unguided", "psnr_ceiling",
             "ssim_edit")  # fmt: skip
    assert fixed | {f"{kind}/enhance" for kind in kinds} <= whole[3].keys()
    for one, other in zip(whole, again, strict=True):
        measured = ("_s", "share", "mfu", "memory_gib")
        assert {k: v for k, v in one.items() if not k.endswith(measured)} == {
            k: v for k, v in other.items() if not k.endswith(measured)
        }


def test_no_dropout_is_warned_of(make_config, capsys):
    train(make_config("objective.dropout.both=0", "objective.dropout.image=0"), dry_run=True)
    out = capsys.readouterr().out
    assert "warning: objective.dropout.image, objective.dropout.both is 0: guidance will" in out
    train(make_config(), dry_run=True)
    assert "warning" not in capsys.readouterr().out


def test_more_workers_than_cores_are_warned_of(make_config):
    config = make_config("data.workers=48")
    [warning] = warnings(config, World(0, 8, 0, 8))
    assert "8 processes with 48 data workers each share" in warning
    assert warnings(make_config("data.workers=0"), World(0, 8, 0, 8)) == []
