"""What many tests need: the golden files and models loaded from them."""

import json
import os
from pathlib import Path

from ipx2p.cli import ENVIRONMENT

# Read when torch starts, here and in the processes that tests start: as every command sets it, and
# one thread, since two do not make tiny models faster.
os.environ.update({**ENVIRONMENT, "OMP_NUM_THREADS": "1", **os.environ})

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def golden_folder(folder: Path, **settings: object) -> Path:
    """The golden weights in a folder of their own, which says how they are used."""
    folder.mkdir()
    for path in (GOLDEN / "diffusers").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "edit_settings.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Inputs and outputs of the reference implementation, see tests/golden/README.md."""
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def coffee() -> Image.Image:
    """The 64 x 64 photograph that the golden edits start from."""
    return Image.open(GOLDEN / "coffee_64.png").convert("RGB")


@pytest.fixture(scope="session")
def editor():
    """The golden edit model; tests must not change it."""
    from ipx2p.editing.editor import Editor

    return Editor.load(GOLDEN / "diffusers", device="cpu")


@pytest.fixture(scope="session")
def editor_v2():
    """The golden edit model with traits of Stable Diffusion 2.x; tests must not change it."""
    from ipx2p.editing.editor import Editor

    return Editor.load(GOLDEN / "diffusers_v2", device="cpu")


@pytest.fixture
def generator() -> torch.Generator:
    """Numbers fixed by a seed."""
    return torch.Generator().manual_seed(0)
