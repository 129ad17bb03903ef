"""A finished sweep of the golden edit model, and a CLIP model of random weights."""

import json
import re
import shutil
import warnings

import pytest
import torch
from PIL import Image

import ipx2p.eval.compare
from ipx2p.cli import run_command
from tests.conftest import GOLDEN

WEIGHTS = GOLDEN / "diffusers"
INSTRUCTIONS = ("make it snow", "make it night")
SPECS = ("ip2p", "tcfg", "interval:low=1000,high=2000")  # the last never guides: one branch


def run(capsys, *argv):
    """Run the command in this process; returns exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: ipx2p.eval.compare.main([str(arg) for arg in argv]))
    out, err = capsys.readouterr()
    return exit_.value.code or 0, out, err


def sweep(*argv):
    """Run the command where it must succeed, on pictures far smaller than the model's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "resolution")
        ipx2p.eval.compare.main([str(arg) for arg in argv])


def assert_one_line(result, message):
    """Exit code 2, nothing but one line, and it says what is wrong."""
    code, _, err = result
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(message, err), err


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """Two pairs of two tasks with captions: a photograph, and it with black and white turned."""
    folder = tmp_path_factory.mktemp("pairs")
    source = Image.open(GOLDEN / "coffee_64.png").convert("RGB")
    source.save(folder / "a.png")
    source.point(lambda value: 255 - value).save(folder / "b.png")
    lines = [
        {
            "source": source,
            "target": target,
            "instruction": [instruction, "not this one"],
            "task": task,
            "source_caption": "a cup",
            "target_caption": "a cup in the snow",
        }
        for source, target, instruction, task in (
            ("a.png", "b.png", INSTRUCTIONS[0], "snow"),
            ("b.png", "a.png", INSTRUCTIONS[1], "night"),
        )
    ]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


@pytest.fixture(scope="session")
def arguments(manifest):
    """Arguments of the sweep, but for --output: 2 pairs x 3 schemes x 2 x 2 scales, 24 edits."""
    return [
        *(WEIGHTS, "--manifest", manifest, "--device", "cpu", "--resolution", 16, "--steps", 2),
        *("--sampler", "euler", "--guidance", *SPECS),
        *("--guidance-scale", 1, 3, "--image-guidance-scale", 1, 2, "--batch-size", 2),
    ]


@pytest.fixture(scope="session")
def finished(arguments, tmp_path_factory):
    """Its output folder; tests must not change it."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    sweep(*arguments, "--output", output)
    return output


@pytest.fixture
def no_curves(monkeypatch):
    """Reports without curves, which take longest to make."""
    monkeypatch.setattr("ipx2p.eval.reporting.has_matplotlib", lambda: False)


@pytest.fixture
def copied(finished, tmp_path):
    """The same, to change."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP model of random weights, with the golden tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizerFast.from_pretrained(WEIGHTS / "tokenizer")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=size | text | {"num_attention_heads": 2},
        vision_config=size | vision,
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
