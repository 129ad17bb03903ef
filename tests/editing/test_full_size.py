"""Edits of full-size originals, from Python and from the command line."""

import json

import pytest
import torch
from PIL import Image

from ipx2p.commands.edit import main
from ipx2p.editing.editor import Editor
from ipx2p.editing.settings import Edited
from ipx2p.errors import InputError
from ipx2p.images import fit, load_image, pixels01_from_image
from ipx2p.photos import ORIENTATION, Photo, read_photo
from ipx2p.transfer import TRANSFERS, carry_over
from tests.conftest import GOLDEN

QUICK = {"num_steps": 1, "sampler": "euler"}
PROFILE = bytes(16) + b"RGB " + bytes(108)


@pytest.fixture
def identity(monkeypatch):
    """Every edit gives the small copy back, as the model saw it."""

    def finish(self, request, latents, guided, place, shared_s):
        return Edited(request.image, pixels01_from_image(request.image), latents[place], 1, 0.0)

    monkeypatch.setattr(Editor, "_finish", finish)


@pytest.fixture(params=[torch.uint8, torch.uint16], ids=["8 bits", "16 bits"])
def portrait(tmp_path, generator, request):
    """A picture of odd sides that is stored turned, with profile and EXIF; its path."""
    high = torch.iinfo(request.param).max + 1
    pixels = torch.randint(high, (97, 151, 3), generator=generator).to(request.param)
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F] = 6, "a camera"
    Photo(pixels, PROFILE, exif.tobytes()).save(tmp_path / "portrait.png")
    return tmp_path / "portrait.png"


@pytest.mark.parametrize("name", TRANSFERS)
def test_an_identity_edit_returns_the_original(editor, identity, portrait, name, tmp_path):
    original = read_photo(portrait)
    result = editor.edit(portrait, "x", resolution=32, full_size=name, **QUICK)
    assert result.images[0].size == (97, 151) and result.pixels01[0].shape == (3, 151, 97)
    (photo,) = result.photos
    same = torch.equal(photo.pixels, original.pixels)
    assert same if name != "upscale" else not same
    assert (photo.icc_profile, photo.exif) == (PROFILE, original.exif)
    photo.save(tmp_path / "again.png")
    assert torch.equal(read_photo(tmp_path / "again.png").pixels, photo.pixels)


def test_the_edit_is_carried_from_what_the_model_saw_to_the_original(editor, portrait):
    original = read_photo(portrait)
    small = editor.edit(portrait, "x", resolution=32, **QUICK)
    source01 = pixels01_from_image(fit(load_image(portrait), 32, editor.vae.config.downscale))
    large = editor.edit(portrait, "x", resolution=32, full_size="affine", **QUICK)
    expected = carry_over(original.pixels, source01, small.pixels01[0], "affine")
    assert torch.equal(large.photos[0].pixels, expected)
    assert small.photos == [None] and small.images[0].size == (24, 32)
    torch.testing.assert_close(large.pixels01[0], large.photos[0].pixels01)


def test_true_is_auto_and_pictures_in_memory_are_edited_too(editor, generator):
    picture = Image.effect_noise((90, 60), 80)
    named, true = (
        editor.edit([picture] * 2, "x", resolution=24, full_size=how, **QUICK)
        for how in ("auto", True)
    )
    assert [photo.pixels.shape for photo in true.photos] == [(60, 90, 3)] * 2
    assert torch.equal(named.photos[0].pixels, true.photos[0].pixels)


@pytest.mark.parametrize(
    ("full_size", "message"),
    [("afine", "unknown transfer 'afine'; did you mean affine"), (2, "full_size is 2, expected")],
)
def test_what_is_no_transfer_gets_one_line(editor, coffee, full_size, message):
    with pytest.raises(InputError, match=message):
        editor.edit(coffee, "x", full_size=full_size)


@pytest.mark.parametrize("option", [["--full-size"], ["--full-size=ratio"]])
def test_the_command_writes_full_size_files(identity, portrait, tmp_path, option):
    out = tmp_path / "out"
    main(
        [str(GOLDEN / "diffusers"), "--image", str(portrait), "--instruction", "x", *option]
        + ["--output", str(out), "--num-images=2", "--resolution=88", "--steps=1", "--device=cpu"]
    )
    original = read_photo(portrait)
    for number in range(2):
        written = read_photo(out / f"portrait-00{number}.png")
        assert torch.equal(written.pixels, original.pixels)
        assert (written.icc_profile, written.exif) == (PROFILE, original.exif)
    name = "ratio" if "ratio" in option[0] else "auto"
    record = json.loads((out / "portrait-000.json").read_text())
    assert (record["full_size"], record["width"], record["height"]) == (name, 97, 151)
    with Image.open(out / "sheet-000.png") as sheet:
        assert sheet.width < 1500
