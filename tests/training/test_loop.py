"""Training runs: what they write, that they resume exactly, and what they refuse."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ipx2p.diffusion.samplers import make_plan
from ipx2p.editing.editor import Editor
from ipx2p.editing.settings import FolderSettings
from ipx2p.errors import InputError
from ipx2p.files import read_json
from ipx2p.training.checkpoint import damages, find_checkpoints
from ipx2p.training.config import OptimizerConfig
from ipx2p.training.learners import EditLearner
from ipx2p.training.loop import train
from ipx2p.training.optimizer import learning_rate
from ipx2p.training.run import Run
from tests.conftest import GOLDEN
from tests.training.conftest import QUICK_VAE, assert_same_run

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_a_run_writes_what_is_promised(make_config, run_folder, capsys):
    train(make_config())
    out = capsys.readouterr().out
    assert "fresh UNet" in out and "38 pairs to train on, 4 held out, on cpu" in out
    assert out.count("eta") == 4 and "mfu" not in out
    table = out[out.index("task") :]
    assert all(word in table for word in ("denoise", "enhance", "input dB", "VAE ceiling dB"))
    for name in ("config.yaml", "command.txt", "tensorboard"):
        assert (run_folder / name).exists()
    for step in (3, 4):
        with Image.open(run_folder / "samples" / f"step_{step:06d}.png") as sheet:
            assert sheet.width > 3 * 128
    scores = json.loads((run_folder / "samples" / "step_000004.json").read_text())["scores"]
    assert [(score["task"], score["pairs"]) for score in scores] == [("denoise", 2), ("enhance", 2)]
    assert [p.name for p in find_checkpoints(run_folder)] == ["step_000002", "step_000004"]
    averaged, raw = (load_file(run_folder / kind / UNET) for kind in ("weights", "weights_raw"))
    assert averaged.keys() == raw.keys()
    assert any(not torch.equal(averaged[key], raw[key]) for key in raw)


def test_trained_weights_edit_as_they_were_validated(finished_run, coffee):
    for folder in ("weights", "weights_raw"):
        editor = Editor.load(finished_run / folder, device="cpu")
        assert editor.settings == FolderSettings(num_steps=2, resolution=32)
    result = editor.edit([coffee], ["x"])
    assert result.images[0].size == (32, 32) and result.evaluations == [6]


def test_whole_pictures_are_validated_where_training_sees_crops(make_config, run_folder):
    inputs = []
    for resolution in (32, 64):
        config = make_config(f"validation.resolution={resolution}", "train.steps=3")
        train(config)
        inputs.append(Run(config).final_scores()[0]["psnr_input"])
    assert inputs[0] != inputs[1]
    assert Editor.load(run_folder / "weights").settings.resolution == 64
    config = json.loads((run_folder / "weights" / "unet" / "config.json").read_text())
    assert config["sample_size"] == 64 // 8


def test_a_finished_run_says_so_and_does_nothing(make_config, finished_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    capsys.readouterr()
    train(make_config())
    out = capsys.readouterr().out
    assert "is finished, all 4 steps" in out and "VAE ceiling" in out and "step_000004.png" in out
    assert "eta" not in out
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


CONSTANT = "optimizer.schedule=constant"


def test_a_finished_run_takes_more_steps_of_a_constant_schedule(make_config, run_folder, capsys):
    train(make_config(CONSTANT))
    train(make_config(CONSTANT, "train.steps=6"))
    assert find_checkpoints(run_folder)[-1].name == "step_000006"
    for fewer in (5, 3):  # a validation was made at step 3; that does not make the run finished
        with pytest.raises(InputError, match=rf"has done 6 steps, train\.steps is {fewer}"):
            train(make_config(CONSTANT, f"train.steps={fewer}"))


def test_more_steps_of_a_cosine_schedule_are_another_run(make_config, finished_run):
    with pytest.raises(
        InputError, match=r"train\.steps was 4 and is 6\. A cosine .* model\.weights=.*/weights"
    ):
        train(make_config("train.steps=6"))


def test_other_settings_are_refused_by_key(make_config, finished_run):
    with pytest.raises(InputError, match=r"data\.resolution was 32 and is 64.*run\.name"):
        train(make_config("data.resolution=64"))
    with pytest.raises(InputError, match=r"data\.mixture\.denoise was None and is 2\.0; data\."):
        train(make_config("data.mixture={denoise: 2, enhance: 1}"))
    train(make_config("train.log_every=2", "validation.every=2"))


def test_a_run_in_place_of_its_weights_is_refused(make_config, finished_run):
    weights = f"model.weights={finished_run}"
    with pytest.raises(InputError, match=r"is the folder of a run: name its weights, .*/weights$"):
        train(make_config("run.name=other", weights, "model.unet=null"), dry_run=True)


def test_weights_say_at_what_size_they_were_trained(finished_run):
    config = json.loads((finished_run / "weights" / "unet" / "config.json").read_text())
    assert config["sample_size"] == 32 // 8


def test_training_keeps_what_only_other_programs_read(finished_run):
    path = "scheduler/scheduler_config.json"
    before, after = (read_json(x / path) for x in (GOLDEN / "diffusers", finished_run / "weights"))
    assert before["timestep_spacing"] == after["timestep_spacing"] == "leading"


def test_training_out_of_memory_is_one_line_with_advice(make_config, monkeypatch):
    monkeypatch.setattr(EditLearner, "losses", lambda *_: torch.empty(10**15))
    with pytest.raises(InputError, match=r"out of memory on the CPU: raise train\.accumulate"):
        train(make_config())


def test_a_start_that_failed_does_not_hold_the_name(make_config, run_folder):
    with pytest.raises(InputError, match="held_out"):
        train(make_config("data.held_out=[no.jpg]"))
    with pytest.raises(InputError, match="does not exist"):
        train(make_config("model.weights=/nowhere/x/y"))
    assert not run_folder.exists()
    train(make_config())


@pytest.mark.slow
def test_a_validation_that_a_kill_prevented_is_made_up_for(make_config, run_folder):
    overrides = ("train.checkpoint_every=1", "train.keep_checkpoints=9")
    train(make_config(*overrides))
    shutil.rmtree(find_checkpoints(run_folder)[-1])  # back to step 3, killed before its validation
    for path in (run_folder / "samples").iterdir():
        path.unlink()
    train(make_config(*overrides))
    assert sorted(path.name for path in (run_folder / "samples").glob("*.json")) == [
        "step_000003.json",
        "step_000004.json",
    ]


def test_what_a_killed_process_left_is_swept_and_links_are_set_right(make_config, finished_run):
    checkpoints = finished_run / "checkpoints"
    (checkpoints / ".step_000006").mkdir()
    (checkpoints / ".step_000002.removed").mkdir()
    unfinished = [
        finished_run / f".{8 * 'ab'}.jsonl",
        finished_run / "samples" / f".{8 * 'cd'}.png",
    ]
    for path in unfinished:
        path.touch()
        os.utime(path, (0, 0))
    shutil.copytree(checkpoints / "step_000004", checkpoints / ".step_000004.replaced")
    (finished_run / "weights").unlink()
    (finished_run / "samples" / "step_000004.json").unlink()
    train(make_config())
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000002", "step_000004"]
    assert not any(path.exists() for path in unfinished)
    assert (finished_run / "weights").resolve() == checkpoints / "step_000004" / "weights"


def test_two_processes_do_not_share_a_run(make_config, run_folder):
    run_folder.mkdir(parents=True)
    code = (
        f"import fcntl, sys; f = open({str(run_folder / '.lock')!r}, 'w')\n"
        "fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match="another process is training in .*run"):
            train(make_config())
        other.kill()
    train(make_config())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: os.truncate(f / "weights_raw" / UNET, 3000), f"{UNET} is damaged"),
        (lambda f: os.truncate(f / "optimizer.safetensors", 3000), "safetensors is damaged"),
        (lambda f: flip_a_bit(f / "optimizer.safetensors"), "safetensors is damaged"),
        (lambda f: (f / "weights" / UNET).unlink(), f"cannot read .*{UNET}"),
        (lambda f: (f / "state.json").write_text("{"), "is not JSON"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    make_config, finished_run, trained_once, capsys, spoil, message
):
    older, newest = find_checkpoints(finished_run)
    spoil(newest)
    train(make_config())
    out = capsys.readouterr().out
    assert re.search(f"warning: .*{message}.*going back to the checkpoint before it", out)
    assert f"resuming from {older}" in out
    assert f"is kept as {newest.with_name('damaged_step_000004')}" in out and "step 4/4" in out
    assert_same_run(finished_run, trained_once)
    train(make_config())
    assert "is finished" in capsys.readouterr().out


def test_damage_to_what_is_not_trained_is_named_and_mended(
    make_config, finished_run, trained_once, capsys
):
    newest = find_checkpoints(finished_run)[-1]
    vae = newest / "weights" / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(vae.read_bytes())
    content[-100] ^= 1
    vae.write_bytes(content)  # in place: the file of all checkpoints
    train(make_config())
    out = capsys.readouterr().out
    assert f"warning: {vae} is damaged" in out and "will be rewritten at the next checkpoint" in out
    assert "step 4/4" not in out  # nothing had to be learned again
    assert_same_run(finished_run, trained_once)
    assert not damages(find_checkpoints(finished_run)[-1])


@pytest.mark.slow
def test_what_follows_a_damaged_checkpoint_is_kept_and_whole(
    make_config, finished_run, trained_once
):
    newest = find_checkpoints(finished_run)[-1]
    shutil.rmtree(newest / "weights" / "vae")
    os.truncate(newest / "optimizer.safetensors", 3000)
    train(make_config("train.keep_checkpoints=1", "train.checkpoint_every=3"))
    best = json.loads((finished_run / "best.json").read_text())["step"]
    kept = [f"step_{step:06d}" for step in sorted({best, 4})]
    assert [path.name for path in find_checkpoints(finished_run)] == kept
    assert_same_run(finished_run, trained_once)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.unlink()  # other checkpoints may share it
    path.write_bytes(content)


def test_a_run_without_a_whole_checkpoint_is_refused(make_config, finished_run):
    for checkpoint in find_checkpoints(finished_run):
        os.truncate(checkpoint / "optimizer.safetensors", 3000)
    with pytest.raises(InputError, match=r"no checkpoint is whole: .*step_000004/opt.* is damaged"):
        train(make_config())


def test_frozen_parts_are_stored_once(make_config, run_folder):
    train(make_config())
    files = [
        checkpoint / kind / "vae" / "diffusion_pytorch_model.safetensors"
        for checkpoint in find_checkpoints(run_folder)
        for kind in ("weights", "weights_raw")
    ]
    assert len(files) == 4 and len({path.stat().st_ino for path in files}) == 1


def test_dry_run_writes_nothing(make_config, run_folder, capsys):
    train(make_config(), dry_run=True)
    assert not run_folder.exists()
    assert "nothing was written" in capsys.readouterr().out


def test_only_the_newest_checkpoints_are_kept(make_config, run_folder):
    train(make_config("train.checkpoint_every=1", "train.keep_checkpoints=2"))
    assert [p.name for p in find_checkpoints(run_folder)] == ["step_000003", "step_000004"]


def test_half_a_checkpoint_is_not_taken_for_one(finished_run):
    (find_checkpoints(finished_run)[-1] / "state.json").unlink()
    assert [path.name for path in find_checkpoints(finished_run)] == ["step_000002"]


@pytest.mark.parametrize(("channels", "said"), [(8, "used as they are"), (4, "widened to 8")])
def test_starting_weights_are_widened_or_taken(make_config, tmp_path, channels, said, capsys):
    start = tmp_path / "start"
    shutil.copytree(GOLDEN / "diffusers", start)
    if channels == 4:
        from safetensors.torch import save_file

        tensors = load_file(start / UNET)
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :4].contiguous()
        save_file(tensors, start / UNET)
        config = json.loads((start / "unet" / "config.json").read_text()) | {"in_channels": 4}
        (start / "unet" / "config.json").write_text(json.dumps(config))
    train(make_config("model.unet=null", f"model.weights={start}"), dry_run=True)
    assert f"{channels} input channels, {said}" in capsys.readouterr().out


def test_manifests_train_too(make_config, tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), "teal").save(tmp_path / f"{name}.png")
    line = {"source": "a.png", "target": "b.png", "instruction": ["x", "y"], "task": "derain"}
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    manifest = f"data.manifest={tmp_path / 'train.jsonl'}"
    validation = f"data.validation_manifest={tmp_path / 'train.jsonl'}"
    pairs = ("data.photos=null", "data.held_out=[]", "data.instructions=per_step")
    train(make_config(*pairs, manifest, validation))


def test_prediction_type_is_written_with_the_weights(make_config, run_folder):
    train(make_config("objective.prediction_type=v_prediction"))
    path = run_folder / "weights" / "scheduler" / "scheduler_config.json"
    assert json.loads(path.read_text())["prediction_type"] == "v_prediction"


def test_zero_terminal_snr_is_written_with_the_weights_and_sampled_with(
    make_config, run_folder, coffee
):
    with pytest.raises(InputError, match=r"zero-terminal SNR.*set objective\.prediction_type"):
        train(make_config("objective.zero_terminal_snr=true", "objective.prediction_type=epsilon"))
    train(make_config("objective.zero_terminal_snr=true", "objective.prediction_type=v_prediction"))
    path = run_folder / "weights" / "scheduler" / "scheduler_config.json"
    assert json.loads(path.read_text())["rescale_betas_zero_snr"] is True
    editor = Editor.load(run_folder / "weights", device="cpu")
    assert make_plan(editor.schedule, "euler", "trailing", 2).sigmas[0] == pytest.approx(
        4096, rel=1e-3
    )
    assert editor.edit([coffee], ["x"]).images[0].size == (32, 32)


def test_weights_of_the_loss_change_what_is_learned_but_not_what_is_logged(
    make_config, run_folder, finished_run
):
    finished = finished_run.rename(finished_run.with_name("finished"))
    train(make_config("objective.min_snr_gamma=1"))
    first = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        for run in (run_folder, finished)
    ]
    assert first[0]["loss"] == first[1]["loss"] and first[0]["grad_norm"] != first[1]["grad_norm"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.min_snr_gamma=5", r"objective\.min_snr_gamma is for objective\.kind edit"),
        ("train.precision=bfloat16", "an autoencoder is trained in float32"),
        ("data.draws=1 data.cache=true", "data.cache holds the output of an autoencoder"),
    ],
)
def test_what_means_nothing_to_an_autoencoder_is_refused(make_config, override, message):
    with pytest.raises(InputError, match=message):
        make_config(*QUICK_VAE, *override.split())


def test_trained_autoencoder_gets_the_scale_of_its_latents(make_config, run_folder):
    train(make_config(*QUICK_VAE))
    config = json.loads((run_folder / "weights" / "vae" / "config.json").read_text())
    assert config["block_out_channels"] == [8, 8]
    assert config["scaling_factor"] != pytest.approx(0.18215)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.held_out=[no.jpg]", r"data\.held_out names no\.jpg, not in .*photos"),
        ("data.held_out=[]", r"data\.held_out is empty"),
        ("data.photos=null", r"set data\.manifest .* or data\.photos"),
        ("data.photos=/nowhere", "/nowhere is not a folder of photographs"),
        ("data.tasks=[dehaze]", r"data\.tasks: no degradation for 'dehaze'"),
        ("data.tasks=[]", r"data\.tasks is empty"),
        ("data.fraction=0", r"data\.fraction is 0\.0, expected a number above 0, at most 1"),
        ("data.fraction=1.5", r"data\.fraction is 1\.5"),
        ("data.fraction=.nan", r"data\.fraction is nan"),
        ("data.holdout_tasks=[denoize]", r"holdout_tasks: .*'denoize'; did you mean denoise\?"),
        ("data.holdout_tasks=[denoise, enhance]", r"data\.holdout_tasks names all tasks, denoise"),
        ("data.mixture={denoise: 1}", r"data\.mixture has no weight for enhance: name every"),
        ("data.mixture={denoise: 1, enhanse: 1}", r"task 'enhanse'; did you mean enhance\?"),
        ("data.mixture={denoise: 1, enhance: -1}", r"data\.mixture\.enhance is -1\.0"),
        ("data.mixture={denoise: .inf, enhance: 1}", r"data\.mixture\.denoise is inf"),
        ("data.mixture={denoise: 0, enhance: 0}", r"data\.mixture is .*expected a weight above 0"),
        ("data.mixture={}", r"data\.mixture is \{\}, expected a weight above 0"),
        ("data.mixture=denoise", r"data\.mixture"),
        ("data.mixture={denoise: much, enhance: 1}", r"data\.mixture\.denoise: Value 'much'"),
        ("data.temperature=0", r"data\.temperature is 0\.0, expected a number above 0, or \.inf"),
        ("data.temperature=.nan", r"data\.temperature is nan"),
        ("data.instructions=per_visit", r"data\.instructions is 'per_visit'; .*per_step"),
        ("data.banks={denoize: x.txt}", r"data\.banks: .*'denoize'; did you mean denoise\?"),
        ("data.banks={denoise: /nowhere.txt}", r"/nowhere\.txt"),
        ("data.on_error=ignore", r"data\.on_error is 'ignore'; .*stop, skip"),
        ("data.max_zoom=0.5", r"data\.max_zoom is 0\.5"),
        ("data.degrade.noise.shot=[2, 1]", r"data\.degrade\.noise\.shot is"),
        ("objective.kind=vae", r"objective\.kind is 'vae'; .*edit, autoencoder"),
        ("objective.dropout.text=2", r"objective\.dropout: shares"),
        ("objective.prediction_type=flow", r"objective\.prediction_type is 'flow'"),
        ("optimizer.schedule=step", r"optimizer\.schedule is 'step'"),
        ("optimizer.learning_rate=0", r"optimizer\.learning_rate is 0"),
        ("optimizer.learning_rate=.nan", r"optimizer\.learning_rate is nan"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas is \[0\.9\]"),
        ("train.steps=0", r"train\.steps is 0, expected 1 or more"),
        ("train.ema_decay=1", r"train\.ema_decay is 1"),
        ("train.processes=0", r"train\.processes is 0, expected 1 or more"),
        ("train.bucket_mb=0", r"train\.bucket_mb is 0\.0, expected a number above 0"),
        ("train.device=cuda:9", "device 'cuda:9' is not available"),
        ("run.name=a/b", r"run\.name is 'a/b', expected the name of one folder"),
        ("run.name=..", r"run\.name is '\.\.', expected the name of one folder"),
        ("run.name=''", r"run\.name is '', expected the name of one folder"),
        ("run.name=${nope}", r"run\.name: .*nope"),
        ("run.name=${", r"the value is not YAML"),
        ("data.held_out=[[a]]", r"data\.held_out is \[\['a'\]\], expected a list of single values"),
        ("data.workers=1000000", r"data\.workers is 1000000, expected 0 or more, at most 256"),
        ("data.draws=0", r"data\.draws is 0, expected 1 or more"),
        ("data.cache=true", r"data\.cache cannot hold what data\.photos draws again.* data\.draws"),
        ("train.precision=float16", r"train\.precision is 'float16'; .*bfloat16"),
        ("train.accumulate=2", r"batch_size is 3, expected a multiple of 2: 1 processes with 2"),
        ("train.max_bad_steps=0", r"train\.max_bad_steps is 0"),
        ("objective.min_snr_gamma=0", r"objective\.min_snr_gamma is 0"),
        ("data.max_zoom=.inf", r"data\.max_zoom is inf"),
        ("data.degrade.low_light.cast=5", r"data\.degrade\.low_light\.cast is 5"),
        ("data.degrade.noise.shot=[0, .inf]", r"data\.degrade\.noise\.shot is"),
        ("optimizer.learning_rate=.inf", r"optimizer\.learning_rate is inf"),
        ("optimizer.learning_rate=1e30", r"optimizer\.learning_rate is 1e\+30, .* at most 1000"),
        ("optimizer.weight_decay=.inf", r"optimizer\.weight_decay is inf"),
        ("train.steps=99999999999999999999", r"train\.steps is 9+, expected 1 or more, at most"),
        ("train.device=meta", "device 'meta' is not available"),
        ("validation.edit.sampler=x", "unknown sampler 'x'"),
        (
            "validation.edit.window=3",
            "window is 3 pixels, expected a multiple of 16 for this model",
        ),
        ("validation.edit.guidance=apg:eta=2,norm=1+rescale", "eta is '2', out of range"),
        ("validation.edit.guidance=autoguidance", "needs a second, weaker network"),
        ("model.weights=/nowhere/x/y", "/nowhere/x/y does not exist"),
        ("model.unet.block_out_channels=[8, 15]", r"UNetConfig: block_out_channels is \[8, 15\]"),
        ("model.unet.in_channels=9", r"UNetConfig: in_channels is 9"),
        ("data.resolution=36", r"data\.resolution is 36, .*the autoencoder's 8 such as 40"),
        ("validation.resolution=36", r"validation\.resolution is 36, .* 8 such as 40"),
        ("validation.edit.num_steps=5000", "5000 steps asked for, expected 1 to 1000"),
        ("model.unet.cross_attention_dim=7", "expects text states of width 7.*gives 32"),
        ("run.dir=/proc", "cannot write"),
    ],
)
def test_bad_settings_are_refused(make_config, override, message):
    with pytest.raises(InputError, match=message):
        train(make_config(override))


def test_learning_rate_warms_up_then_falls_to_zero():
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=4)
    rates = [learning_rate(config, step, 104) for step in range(105)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[103] > 0  # the last step still learns
    assert rates[54] == pytest.approx(1.0) and rates[104] == pytest.approx(0, abs=1e-12)
    assert all(before >= after for before, after in pairwise(rates[4:]))
    constant = OptimizerConfig(learning_rate=2.0)
    assert {learning_rate(constant, step, 104) for step in range(104)} == {2.0}
