"""How a weights folder says that it is used."""

import json
import re
from dataclasses import asdict

import pytest
import torch

from ipx2p.editing.editor import Editor
from ipx2p.editing.settings import EditSettings, FolderSettings, pick_resolution
from ipx2p.errors import InputError
from ipx2p.weights.folder import Weights
from tests.conftest import GOLDEN, golden_folder


def test_settings_come_back_as_they_were_saved(tmp_path):
    said = FolderSettings("heun", "karras", 7, "ip2p+apg:norm=7.5", 3.0, 1.25, "wavelet", 96)
    weights = Weights.load(GOLDEN / "diffusers")
    weights.edit_settings = asdict(said)
    weights.save(tmp_path)
    assert FolderSettings.read(tmp_path) == said
    assert Weights.load(tmp_path).edit_settings == asdict(said)


def test_what_a_folder_does_not_say_has_the_usual_value(tmp_path):
    assert FolderSettings.read(GOLDEN / "diffusers") == FolderSettings()
    assert FolderSettings().but({}) == EditSettings()
    own = golden_folder(tmp_path / "own", num_steps=4, guidance_scale=1)
    assert FolderSettings.read(own) == FolderSettings(num_steps=4, guidance_scale=1.0)
    assert pick_resolution(own, None)[0] == 128 == Editor.load(own, device="cpu").resolution


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"steps": 4}, "unknown key 'steps'; did you mean num_steps?"),
        ({"num_steps": 0}, "num_steps is 0, expected 1 to 1000"),
        ({"num_steps": 1001}, "num_steps is 1001, expected 1 to 1000"),
        ({"num_steps": 4.0}, "num_steps is 4.0, expected int"),
        ({"num_steps": True}, "num_steps is True, expected int"),
        ({"sampler": None}, "sampler is None, expected str"),
        ({"sampler": "eular"}, "unknown sampler 'eular'; did you mean euler"),
        ({"spacing": "x"}, "unknown spacing 'x'"),
        ({"guidance": "apg:eta=2"}, "eta"),
        ({"fidelity": "wavelet:weight=2"}, "fidelity wavelet:weight is '2', out of range"),
        ({"fidelity": None}, "fidelity is None, expected str"),
        ({"guidance": "cfgpp", "sampler": "heun"}, "cfgpp"),
        ({"guidance_scale": "7"}, "guidance_scale is '7', expected float"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan, expected float"),
        ({"image_guidance_scale": float("inf")}, "image_guidance_scale is inf, expected float"),
        ({"resolution": 0}, "resolution is 0, expected 1 to 8192"),
        ({"resolution": 10**9}, "resolution is 1000000000, expected 1 to 8192"),
        ({"resolution": "128"}, "resolution is '128', expected int | None"),
        ([], "holds a JSON list, expected an object"),
    ],
)
def test_a_file_that_cannot_be_gets_one_line_that_names_it(tmp_path, said, message):
    (tmp_path / "edit_settings.json").write_text(json.dumps(said))
    named = re.escape(f"{tmp_path}/edit_settings.json") + ":? .*" + re.escape(message)
    with pytest.raises(InputError, match=named) as error:
        FolderSettings.read(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_left_out_of_an_edit_is_what_the_folder_says(tmp_path, editor, coffee):
    said = {"sampler": "euler", "num_steps": 2, "guidance_scale": 3.0, "resolution": 32}
    own = Editor.load(golden_folder(tmp_path / "own", **said), device="cpu")
    assert own.resolution == own.settings.resolution == 32

    def latents(model, **given):
        return model.edit(coffee, "x", **given).latents[0]

    assert torch.equal(latents(own), latents(editor, **said))
    for given in ({"guidance_scale": 1.0}, {"sampler": "ddim"}, {"resolution": 48}):
        assert torch.equal(latents(own, **given), latents(editor, **said | given))
    assert own.edit(coffee, "x", resolution=None).images[0].size == (64, 64)
