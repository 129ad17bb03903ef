"""The shipped configs: read, their data commands parsed, their networks built, one step taken."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from ipx2p.cli import run_command
from ipx2p.commands import train as command
from ipx2p.data.instructions import bank
from ipx2p.data.prepare.mix import BLOG
from ipx2p.models.flops import counted_flops
from ipx2p.models.unet import LATENT_CHANNELS, UNet, UNetConfig
from ipx2p.models.vae import VAE, VAEConfig
from ipx2p.training.checkpoint import find_checkpoints
from ipx2p.training.config import TrainConfig
from ipx2p.weights.convert import widen
from tests.conftest import GOLDEN, ROOT

FILES = {
    path.relative_to(ROOT / "configs").as_posix(): path
    for path in sorted((ROOT / "configs").glob("**/*.yaml"))
}
RUNS = [name for name, path in FILES.items() if "run" in yaml.safe_load(path.read_text())]
FULL_SIZE = {  # -> samples of the run
    **dict.fromkeys(
        ("restore_sd15", "restore_ip2p", "cartoonize_sd15", "cartoonize_ip2p"), 120_000
    ),
    "instruct_pix2pix": 10_240_000,
    "magicbrush": 640_000,
}
TASKS = [*BLOG, "cartoonize"]


def load(name, *overrides):
    return TrainConfig.load(FILES[name], [*overrides])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A manifest with two pairs of every task."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for number in range(2):
        for side, colour in (("source", "teal"), ("target", "olive")):
            Image.new("RGB", (264, 264 + number), colour).save(folder / f"{side}{number}.png")
        lines += [
            {
                "source": f"source{number}.png",
                "target": f"target{number}.png",
                "instruction": list(bank(task)),
                "task": task,
            }
            for task in TASKS
        ]
    (folder / "all.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / "all.jsonl"


@pytest.mark.parametrize("name", FILES)
def test_a_config_says_what_it_is_before_anything_else(name):
    assert FILES[name].read_text().startswith("# ")


def comments(name):
    """What a file says at its top, and what the config says that it names."""
    text = FILES[name].read_text().partition("\nrun:")[0]
    named = [other for other in FILES if f"configs/{other}" in text]
    return "".join(FILES[x].read_text().partition("\nrun:")[0] for x in {name, *named})


@pytest.mark.parametrize("name", RUNS)
def test_a_config_is_read_and_explains_the_downloads_that_its_data_needs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(name)
    commands = [command.parse_line(line) for line in config.data.prepare]
    made = {args.output for args in commands}
    for manifest in (config.data.manifest, config.data.validation_manifest):
        assert not commands or Path(manifest).parent in made
    for path in {path for args in commands for path in command.inputs(args)} - made:
        top = "/".join(path.parts[:2])
        assert path.exists() or (top.startswith("downloads/") and top in comments(name))


@pytest.mark.parametrize(
    "name", [name for name in RUNS if (ROOT / load(name).model.weights).is_dir()]
)
def test_a_config_for_the_weights_of_the_repository_is_in_order(
    name, pairs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    keys = ("manifest", "validation_manifest") if load(name).data.manifest else ()
    overrides = [f"run.dir={tmp_path}", *(f"data.{key}={pairs}" for key in keys)]
    command.main([str(FILES[name]), *overrides, "--dry-run"])
    assert "nothing was written" in capsys.readouterr().out


@pytest.mark.parametrize("name", RUNS)
def test_one_step_of_a_config_is_taken_with_tiny_weights(name, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = [
        f"run.dir={tmp_path}", "run.name=small", f"model.weights={GOLDEN / 'diffusers'}",
        "model.unet=null", "model.vae=null", "data.resolution=32", "data.workers=0",
        "train.steps=1", "train.batch_size=4", "train.device=cpu", "train.precision=float32",
        "validation.pairs_per_task=1", "validation.edit.num_steps=1", "evaluation=null",
    ]  # fmt: skip
    if load(name).data.manifest:
        small += [f"data.{key}={pairs}" for key in ("manifest", "validation_manifest")]
    else:
        small += ["data.photos=assets/photos", "data.held_out=[castle.jpg]", "data.cache=false"]
    command.main([str(FILES[name]), *small])
    assert len(find_checkpoints(tmp_path / "small")) == 1
    lines = [*map(json.loads, (tmp_path / "small" / "metrics.jsonl").read_text().splitlines())]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


# Runs at full size


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_run_at_full_size_is_the_published_one(name):
    config = load(f"{name}.yaml")
    assert config.train.steps * config.train.batch_size == FULL_SIZE[name]
    assert config.data.resolution == 256 and config.data.flip and config.train.ema_decay > 0
    dropout = config.objective.dropout
    assert dropout.text == dropout.image == dropout.both == 0.05
    edit = config.validation.edit
    assert (edit.num_steps, edit.guidance_scale, edit.image_guidance_scale) == (20, 7.0, 1.5)
    rate = 1e-4 if name == "instruct_pix2pix" else 5e-5
    assert (config.optimizer.learning_rate, config.optimizer.schedule) == (rate, "constant")
    if FULL_SIZE[name] == 120_000:
        assert (config.train.steps, config.run.seed) == (15_000, 42)
        fixed = "fixed" if name.startswith("restore") else "per_pair"
        assert config.data.instructions == fixed


@pytest.mark.parametrize("name", ["restore", "cartoonize"])
def test_runs_from_both_weights_differ_in_nothing_else(name):
    one, other = (load(f"{name}_{start}.yaml") for start in ("sd15", "ip2p"))
    assert one.model.weights != other.model.weights
    one.model.weights, one.run.name = other.model.weights, other.run.name
    assert one == other


@pytest.mark.parametrize("in_channels", [4, 8])
def test_networks_of_real_size_are_built_and_cost_what_the_headers_say(in_channels):
    """Without memory for their weights."""
    with torch.device("meta"):
        unet = widen(UNet(UNetConfig(in_channels=in_channels)))
        vae = VAE(VAEConfig())
    assert unet.config.in_channels == 2 * LATENT_CHANNELS
    assert sum(p.numel() for p in unet.parameters()) == 859_532_484
    config = load("instruct_pix2pix.yaml")
    side = config.data.resolution // vae.config.downscale
    flops = counted_flops(unet.config, side, side, training=True)
    assert round(flops / 1e12, 2) == 0.54
    assert all("0.54 TFLOP" in comments(f"{name}.yaml") for name in FULL_SIZE)


# data.prepare


YAML = f"""
run: {{name: test}}
model: {{weights: {GOLDEN / "diffusers"}}}
data:
  prepare:
    - restore photos sets/a --tasks denoise --short-side 32 --split 60 40 0 --workers 0
    - mix sets/all sets/a
  manifest: sets/all/train.jsonl
  validation_manifest: sets/all/val.jsonl
  resolution: 32
  workers: 0
train: {{steps: 1, batch_size: 2, device: cpu}}
validation: {{pairs_per_task: 1, edit: {{num_steps: 1}}}}
"""


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Run `train.py` in a folder with photographs; returns exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(YAML)
    (tmp_path / "photos").mkdir()
    for number, photo in enumerate(sorted((ROOT / "assets" / "photos").glob("*.jpg"))[:4]):
        with Image.open(photo) as image:
            image.resize((48, 40)).save(tmp_path / "photos" / f"{number}.png")

    def run(*argv):
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: command.main(["config.yaml", *argv]))
        return exit_.value.code or 0, *capsys.readouterr()

    return run


def test_data_is_made_before_training_once(start, tmp_path):
    code, out, err = start()
    assert code == 0, err
    assert "python -m ipx2p.data.prepare mix sets/all sets/a" in out and "weights (averaged)" in out
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").rglob("*")}
    code, out, _ = start("train.steps=2", "data.prepare=[]")  # another recipe of the same pairs
    assert code == 0 and "resuming from" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").rglob("*")} == made
    (tmp_path / "sets" / "all" / "val.jsonl").unlink()
    code, out, _ = start("train.steps=2")
    assert code == 0 and "is finished" in out and "prepare" not in out


def test_two_processes_share_the_work_of_making_data_and_train(start, tmp_path):
    """The first line is made by both; mixing is the work of the first one, and both wait for it."""
    both = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    line = [*both, ROOT / "train.py", "config.yaml"]
    run = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("python -m ipx2p.data.prepare") == 2  # printed once for each line
    assert "on 2 x cpu" in run.stdout and (tmp_path / "runs/test/weights/unet").is_dir()


def test_a_dry_run_says_what_would_be_made(start, tmp_path):
    code, out, _ = start("--dry-run")
    assert code == 0 and "python -m ipx2p.data.prepare restore photos sets/a" in out
    assert not (tmp_path / "sets").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.prepare=[restre photos sets/a]"], "'restre photos sets/a': .*choice: 'restre'"),
        (["data.prepare=['restore \"photos sets/a']"], "No closing quotation"),
        (["data.prepare=[restore nowhere sets/b, import lol gone sets/c, mix sets/d sets/b]"],
         r"needs nowhere, gone, not found: download"),
        (["model.weights=nil"], "nil does not exist"),
        (["data.prepare=[restore photos sets/a --count 9]"], "fewer than --count 9"),
        (["data.prepare=[restore photos sets/a --workers 0]"], "sets/all/train.jsonl does not exi"),
        (["data.manifest=null", "data.photos=photos"], "data.prepare makes manifests: set data.ma"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_made_is_reported_in_one_line(start, overrides, message, tmp_path):
    code, _, err = start(*overrides)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and re.search(message, errors[0]), err
    assert not (tmp_path / "runs").exists()
