"""Edits in windows: whole edits with guidance of all kinds, commands, what is refused."""

import json

import pytest
import torch

from ipx2p.commands.edit import main
from ipx2p.diffusion.windows import Windows
from ipx2p.editing.settings import pick_resolution
from ipx2p.errors import InputError
from ipx2p.eval.cases import cases_of_images
from ipx2p.eval.models import EvalConfig, make_trials, parse_models
from tests.conftest import GOLDEN, golden_folder
from tests.editing.test_editor import assert_latents_close
from tests.editing.test_editor_guidance import LAYERS, weaker

QUICK = {"num_steps": 2, "sampler": "euler", "resolution": 96, "guidance_scale": 4.0}
SPECS = ["ip2p", f"pag:{LAYERS}", f"seg:{LAYERS}", "autoguidance", "mask", "deepcache:every=2"]


@pytest.fixture(scope="module")
def weak(editor):
    return weaker(editor.unet)


def edit(editor, pictures, spec, weak, **how):
    more = {"weak": weak} if "autoguidance" in spec else {}
    return editor.edit(pictures, "derain it", guidance=spec, **more, **QUICK | how)


@pytest.mark.parametrize("spec", SPECS)
def test_every_kind_of_guidance_edits_in_windows(editor, coffee, weak, monkeypatch, spec):
    whole = edit(editor, coffee, spec, weak)
    inside = edit(editor, coffee, spec, weak, window=128)
    assert torch.equal(inside.latents[0], whole.latents[0])
    called = []
    original = Windows.__call__

    def counted(windows, *args, **more):
        called.append(windows.network)
        return original(windows, *args, **more)

    monkeypatch.setattr(Windows, "__call__", counted)
    pictures = [coffee, coffee.rotate(90)]
    together = edit(editor, pictures, spec, weak, window=64, seeds=[0, 1])
    assert {*called} == {editor.unet, *([weak] if "autoguidance" in spec else [])}
    latents = together.latents[0]
    assert latents.isfinite().all() and (latents - whole.latents[0]).abs().max() > 1e-4
    alone = edit(editor, pictures[1], spec, weak, window=64, seeds=1, batch_branches=False)
    assert_latents_close(alone.latents[0], together.latents[1])
    if "deepcache" not in spec:
        assert together.evaluations[0] == whole.evaluations[0]


def test_a_window_that_cannot_be_halved_is_refused(editor, coffee):
    for window in (-64, 32, 100):
        with pytest.raises(InputError, match=f"window is {window} pixels, expected a multiple of"):
            editor.edit(coffee, "x", window=window, num_steps=1)


def test_the_command_edits_in_windows_and_records_them(tmp_path, capsys):
    weights = golden_folder(tmp_path / "own", num_steps=1, resolution=64, window=64)
    argv = [str(weights), "--image", str(GOLDEN / "coffee_64.png"), "--instruction", "x"]
    argv += ["--device=cpu", f"--output={tmp_path / 'out'}", "--resolution=96"]
    for number, (more, window) in enumerate(
        [([], 64), (["--window=128"], 128), (["--window=0"], 0)]
    ):
        main(argv + more)
        record = json.loads((tmp_path / "out" / f"coffee_64-{number:03d}.json").read_text())
        assert record["window"] == window
    pictures = [(tmp_path / "out" / f"coffee_64-{n:03d}.png").read_bytes() for n in range(3)]
    assert pictures[0] != pictures[1] == pictures[2]
    with pytest.raises(InputError, match="window is 32 pixels, expected a multiple of"):
        main([*argv, "--window=32"])


def test_the_size_that_the_model_sees_is_that_of_the_window(tmp_path):
    weights = golden_folder(tmp_path / "own", resolution=64)
    assert "resolution 128 is far from the 64" in pick_resolution(weights, 128)[2][0]
    assert pick_resolution(weights, 128, 64)[2] == []
    assert "window 128 is far from the 64" in pick_resolution(weights, 256, 128)[2][0]


def test_a_window_is_part_of_what_tells_edits_apart(tmp_path):
    weights = golden_folder(tmp_path / "own", num_steps=1)
    config = EvalConfig(models=[str(weights)], window=[0, 64])
    [model] = parse_models(config)
    assert [one.window for one in model.settings] == [0, 64]
    [other] = parse_models(EvalConfig(models=[f"{weights}@window=64"]))
    assert other.settings == model.settings[1:]
    cases = cases_of_images([GOLDEN / "coffee_64.png"], ["derain it"])
    trials = make_trials(cases, model, [0], {})
    assert len({trial.edit for trial in trials}) == 2
    assert [trial.record(picture=None).settings["window"] for trial in trials] == [0, 64]
