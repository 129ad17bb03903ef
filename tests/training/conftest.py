"""A training run that takes seconds: tiny networks on two photographs."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipx2p.training.checkpoint import find_checkpoints, num_steps
from ipx2p.training.config import TrainConfig
from ipx2p.training.loop import train
from tests.conftest import GOLDEN, ROOT

YAML = f"""
run: {{name: test}}
model:
  weights: {GOLDEN / "diffusers"}
  unet:
    block_out_channels: [8, 16]
    down_block_types: [CrossAttnDownBlock2D, DownBlock2D]
    num_attention_heads: [2, 2]
    layers_per_block: 1
    cross_attention_dim: 32
    norm_num_groups: 4
data:
  photos: {ROOT / "assets" / "photos"}
  held_out: [castle.jpg, coffee.jpg]
  instructions: fixed
  resolution: 32
  max_zoom: 2.0
  workers: 0
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 2, schedule: cosine}}
train: {{steps: 4, batch_size: 3, checkpoint_every: 2, log_every: 1, device: cpu}}
validation: {{every: 3, pairs_per_task: 2, edit: {{num_steps: 2}}}}
"""
QUICK_VAE = (
    "objective.kind=autoencoder",
    "model.unet=null",
    "model.vae={block_out_channels: [8, 8], layers_per_block: 1, norm_num_groups: 4}",
)
QUICK_WRAPPING = ("objective.kind=wrapping", "model.unet=null", "validation.edit.fidelity=wrap")


def all_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor that the newest checkpoint of a run holds."""
    newest = find_checkpoints(run)[-1]
    return {
        f"{path.relative_to(newest)}:{key}": tensor
        for path in sorted(newest.rglob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    """The newest checkpoints of two runs are equal bit for bit."""
    one, other = all_tensors(one), all_tensors(other)
    assert one.keys() == other.keys()
    assert [key for key, tensor in one.items() if not torch.equal(tensor, other[key])] == []


def forget(run: Path, step: int) -> None:
    """Make it look as if the run had been killed just after the checkpoint of a step."""
    for checkpoint in find_checkpoints(run):
        if num_steps(checkpoint) > step:
            shutil.rmtree(checkpoint)
    for path in (run / "samples").glob("step_*"):
        if int(path.stem.removeprefix("step_")) >= step:
            path.unlink()


@pytest.fixture
def make_config(tmp_path):
    """Settings of a quick run below `tmp_path`, with overrides."""
    path = tmp_path / "config.yaml"
    path.write_text(YAML)

    def make(*overrides: str) -> TrainConfig:
        return TrainConfig.load(path, [f"run.dir={tmp_path / 'runs'}", *overrides])

    return make


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """Where `make_config`'s runs are."""
    return tmp_path / "runs" / "test"


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Path:
    """The folder of a finished run of the default settings; tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(YAML)
    train(TrainConfig.load(folder / "config.yaml", [f"run.dir={folder}"]))
    return folder / "test"


@pytest.fixture
def finished_run(trained_once, run_folder) -> Path:
    """A finished run of the default settings, to be used up: what `train(make_config())` leaves."""
    return shutil.copytree(trained_once, run_folder, symlinks=True)
