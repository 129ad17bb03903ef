"""Converting weights: round trips, widening, averages, other autoencoders, refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipx2p.editing.editor import Editor
from ipx2p.errors import InputError
from ipx2p.files import read_json
from ipx2p.models.unet import UNet
from ipx2p.models.vae import VAE
from ipx2p.weights.convert import convert, widen
from ipx2p.weights.maps import UNET_PREFIX, ema_key
from tests.conftest import GOLDEN, golden_folder

FOLDER, LDM = GOLDEN / "diffusers", GOLDEN / "ldm.safetensors"
PARTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
CONV_IN = f"{UNET_PREFIX}input_blocks.0.0.weight"


def as_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same_tensors(one, other):
    """Name, shape, dtype and bytes."""
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and tensor.shape == other[key].shape, key
        assert torch.equal(as_bytes(tensor), as_bytes(other[key])), key


def assert_same_folders(one, other):
    for path in PARTS.values():
        assert_same_tensors(load_file(one / path), load_file(other / path))


def narrow(folder):
    """A text-to-image model: the golden one without the channels of the source."""
    shutil.copytree(FOLDER, folder)
    tensors = load_file(folder / PARTS["unet"])
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :4].contiguous()
    save_file(tensors, folder / PARTS["unet"])
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 4}))
    return folder


@pytest.fixture
def text_to_image(tmp_path):
    return narrow(tmp_path / "text_to_image")


def test_single_file_becomes_the_reference_folder(tmp_path):
    convert(str(LDM), tmp_path / "out", config=str(FOLDER))
    assert_same_folders(tmp_path / "out", FOLDER)


def test_single_file_edits_like_the_reference(tmp_path, golden, coffee):
    convert(str(LDM), tmp_path / "out", config=str(FOLDER))
    result = Editor.load(tmp_path / "out", device="cpu").edit(
        [coffee],
        ["cartoonize the image"],
        noise=[golden["edit.noise"][0]],
        step_noise=[golden["edit.step_noise"][:, 0]],
    )
    expected = golden["edit.euler_ancestral.linspace.latents"][0]
    assert (result.latents[0] - expected).abs().max() <= 1e-4 * expected.std()


def test_a_folder_keeps_how_it_is_used(tmp_path):
    said = {"num_steps": 5, "resolution": 64}
    convert(str(golden_folder(tmp_path / "own", **said)), tmp_path / "out", dtype="float16")
    assert read_json(tmp_path / "out/edit_settings.json") == said
    convert(str(FOLDER), tmp_path / "silent")
    assert not (tmp_path / "silent/edit_settings.json").exists()


def test_folder_becomes_the_reference_single_file(tmp_path):
    convert(str(FOLDER), tmp_path / "out.safetensors", to="ldm")
    assert_same_tensors(load_file(tmp_path / "out.safetensors"), load_file(LDM))


@pytest.mark.parametrize("channels", [8, 4])
def test_round_trip_gives_every_tensor_back(tmp_path, channels):
    start = FOLDER if channels == 8 else narrow(tmp_path / "start")
    convert(str(start), tmp_path / "one.safetensors", to="ldm")
    assert load_file(tmp_path / "one.safetensors")[CONV_IN].shape[1] == channels
    convert(str(tmp_path / "one.safetensors"), tmp_path / "back", config=str(FOLDER))
    assert_same_folders(tmp_path / "back", start)
    config = json.loads((tmp_path / "back" / "unet" / "config.json").read_text())
    assert config["in_channels"] == channels
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert ("InstructPix2Pix" in index["_class_name"]) == (channels == 8)


@pytest.mark.parametrize("folder", ["diffusers", "diffusers_v2"])
def test_folder_to_folder_changes_nothing(tmp_path, folder):
    convert(str(GOLDEN / folder), tmp_path / "out")
    assert_same_folders(tmp_path / "out", GOLDEN / folder)


def test_mixed_dtypes_are_kept(tmp_path):
    start = tmp_path / "start"
    shutil.copytree(FOLDER, start)
    tensors = load_file(start / PARTS["unet"])
    tensors["conv_in.weight"] = tensors["conv_in.weight"].float()
    tensors["conv_out.bias"] = tensors["conv_out.bias"].bfloat16()
    save_file(tensors, start / PARTS["unet"])
    convert(str(start), tmp_path / "one.safetensors", to="ldm")
    convert(str(tmp_path / "one.safetensors"), tmp_path / "back", config=str(start))
    assert_same_tensors(load_file(tmp_path / "back" / PARTS["unet"]), tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_that_of_all_tensors(tmp_path, dtype):
    convert(str(FOLDER), tmp_path / "out", dtype=dtype)
    for path in PARTS.values():
        before, after = load_file(FOLDER / path), load_file(tmp_path / "out" / path)
        for key, tensor in after.items():
            assert torch.equal(tensor, before[key].to(getattr(torch, dtype)))


# Widening


@torch.no_grad()
def test_widened_model_equals_its_parent_for_any_source(text_to_image, generator):
    parent = UNet.load(text_to_image / "unet")
    wide = widen(UNet.load(text_to_image / "unet"))
    assert torch.equal(wide.conv_in.bias, parent.conv_in.bias)
    assert wide.conv_in.bias.abs().max() > 0
    x, source = torch.randn(2, 2, 4, 8, 8, generator=generator)
    timesteps, text = torch.tensor([7, 900]), torch.randn(2, 77, 32, generator=generator)
    expected = parent(x, timesteps, text, None)
    for scale in (0, 1, 30):
        torch.testing.assert_close(wide(x, timesteps, text, scale * source), expected)


def test_edit_option_widens_and_carries_all_else_over(tmp_path, text_to_image):
    convert(str(text_to_image), tmp_path / "wide", edit=True)
    before = load_file(text_to_image / PARTS["unet"])
    after = load_file(tmp_path / "wide" / PARTS["unet"])
    weight = after.pop("conv_in.weight")
    old = before.pop("conv_in.weight")
    assert torch.equal(weight[:, :4], old) and weight[:, 4:].count_nonzero() == 0
    assert_same_tensors(before, after)
    Editor.load(tmp_path / "wide", device="cpu")


def test_edit_option_leaves_an_edit_model_as_it_is(tmp_path):
    convert(str(FOLDER), tmp_path / "out", edit=True)
    assert_same_folders(tmp_path / "out", FOLDER)


@torch.no_grad()
def test_add_difference_adds_what_tuning_changed(tmp_path, text_to_image):
    other = tmp_path / "other"
    shutil.copytree(text_to_image, other)
    tensors = {k: (t + 0.5).half() for k, t in load_file(other / PARTS["unet"]).items()}
    save_file(tensors, other / PARTS["unet"])
    convert(str(other), tmp_path / "out", add_difference=(str(FOLDER), str(text_to_image)))
    got, tuned = load_file(tmp_path / "out" / PARTS["unet"]), load_file(FOLDER / PARTS["unet"])
    assert torch.equal(got["conv_in.weight"][:, 4:], tuned["conv_in.weight"][:, 4:])
    for key, tensor in tensors.items():
        same_part = got[key][:, :4] if key == "conv_in.weight" else got[key]
        assert torch.equal(same_part, tensor), key


# What single files hold beside the weights


def original_checkpoint(path, *, averages=True):
    """A checkpoint as the original trainer writes it; the averages are the raw weights plus 1."""
    tensors = load_file(LDM)
    extra = {"betas": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    extra |= {"model_ema.num_updates": torch.tensor(3), position_ids: torch.arange(77)[None]}
    extra |= {"first_stage_model.loss.logvar": torch.zeros(())}
    if averages:
        extra |= {ema_key(k): t + 1 for k, t in tensors.items() if k.startswith(UNET_PREFIX)}
    content = {"state_dict": tensors | extra, "global_step": 22_000, "epoch": 1}
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("which", "added"), [("ema", 1), ("raw", 0), (None, 1)])
def test_averaged_or_raw_weights_are_taken(tmp_path, capsys, which, added):
    path = original_checkpoint(tmp_path / "model.ckpt")
    convert(str(path), tmp_path / "out", which=which, config=str(FOLDER))
    got, raw = load_file(tmp_path / "out" / PARTS["unet"]), load_file(FOLDER / PARTS["unet"])
    assert_same_tensors(got, {key: tensor + added for key, tensor in raw.items()})
    assert_same_tensors(
        load_file(tmp_path / "out" / PARTS["vae"]), load_file(FOLDER / PARTS["vae"])
    )
    assert ("averaged (EMA) weights" if added else "raw weights") in capsys.readouterr().out


def test_averages_that_are_not_there_are_refused(tmp_path):
    path = original_checkpoint(tmp_path / "model.ckpt", averages=False)
    convert(str(path), tmp_path / "raw", config=str(FOLDER))
    with pytest.raises(InputError, match=r"averages \(EMA\) of 0 of 684 .* use --weights raw"):
        convert(str(path), tmp_path / "ema", which="ema", config=str(FOLDER))


def test_text_encoder_without_its_prefix_and_linear_vae_attention_load(tmp_path):
    tensors = {
        key.replace("transformer.text_model.", "transformer."): (
            tensor[:, :, 0, 0] if ".attn_1." in key and tensor.ndim == 4 else tensor
        )
        for key, tensor in load_file(LDM).items()
    }
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "model.safetensors")
    convert(str(tmp_path / "model.safetensors"), tmp_path / "out", config=str(FOLDER))
    assert_same_folders(tmp_path / "out", FOLDER)


# Other parts


@pytest.mark.parametrize("kind", ["weights folder", "vae folder", "own file", "model file"])
def test_another_vae_is_swapped_in(tmp_path, kind):
    other = tmp_path / "other"
    shutil.copytree(FOLDER, other)
    tensors = {key: tensor + 1 for key, tensor in load_file(other / PARTS["vae"]).items()}
    save_file(tensors, other / PARTS["vae"])
    source = {"weights folder": other, "vae folder": other / "vae"}.get(kind)
    if source is None:
        convert(str(other), tmp_path / "model.safetensors", to="ldm")
        source = tmp_path / "model.safetensors"
        if kind == "own file":
            own = {
                key.removeprefix("first_stage_model."): tensor
                for key, tensor in load_file(source).items()
                if key.startswith("first_stage_model.")
            }
            source = tmp_path / "vae.ckpt"
            torch.save({"state_dict": own | {"loss.logvar": torch.zeros(())}}, source)
    convert(str(FOLDER), tmp_path / "out", vae=str(source))
    assert_same_tensors(load_file(tmp_path / "out" / PARTS["vae"]), tensors)
    unet = load_file(tmp_path / "out" / PARTS["unet"])
    assert_same_tensors(unet, load_file(FOLDER / PARTS["unet"]))
    VAE.load(tmp_path / "out" / "vae")


@pytest.mark.parametrize(
    ("prediction", "expected"), [(None, "epsilon"), ("epsilon", "epsilon"), ("v", "v_prediction")]
)
def test_prediction_type_is_written(tmp_path, prediction, expected):
    convert(str(LDM), tmp_path / "out", config=str(FOLDER), prediction=prediction)
    path = tmp_path / "out" / "scheduler" / "scheduler_config.json"
    assert json.loads(path.read_text())["prediction_type"] == expected


@pytest.mark.parametrize("source", ["single file", "folder"])
def test_the_schedule_keeps_what_only_other_programs_read(tmp_path, source):
    folder, file = shutil.copytree(FOLDER, tmp_path / "in"), "scheduler/scheduler_config.json"
    raw = json.loads((folder / file).read_text()) | {"timestep_spacing": "leading"}
    raw |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": False}
    (folder / file).write_text(json.dumps(raw))
    if source == "folder":
        convert(str(folder), tmp_path / "out", edit=True)
    else:
        convert(str(LDM), tmp_path / "out", config=str(folder), prediction="v")
    written = json.loads((tmp_path / "out" / file).read_text())
    kept = ("_class_name", "timestep_spacing", "skip_prk_steps", "clip_sample")
    assert [written[name] for name in kept] == ["PNDMScheduler", "leading", True, False]
    assert written["prediction_type"] == ("epsilon" if source == "folder" else "v_prediction")


@pytest.mark.parametrize("name", ["tokenizer folder", "weights folder"])
def test_tokenizer_is_taken_from_where_it_is_named(tmp_path, name):
    folder = GOLDEN / "diffusers_v2"
    source = folder / "tokenizer" if name == "tokenizer folder" else folder
    convert(str(LDM), tmp_path / "out", config=str(FOLDER), tokenizer=str(source))
    got = (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes()
    assert got == (folder / "tokenizer" / "tokenizer.json").read_bytes()


# Refusals


def changed(change):
    """The reference single file with a change, as a function that writes it."""

    def write(path):
        tensors = load_file(LDM)
        change(tensors)
        save_file(tensors, path)

    return write


def only(key):
    return changed(lambda tensors: (tensors.clear(), tensors.update({key: torch.zeros(2, 2)})))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (only("conditioner.embedders.0.x"), "is Stable Diffusion XL"),
        (changed(lambda t: t.update({"cond_stage_model.model.ln.weight": torch.ones(1)})),
         r"is Stable Diffusion 2\.x with its OpenCLIP text encoder; 2\.x loads from a weights"),
        (only("double_blocks.0.x"), "is Flux"),
        (only("down_blocks.0.x"), "is the U-Net of a weights folder"),
        (only("encoder.down.0.x"), "is an autoencoder alone: give it with --vae"),
        (only("lora_unet_x"), "is a LoRA"),
        (only("anything"), "is not a Stable Diffusion model: it lacks model.diffusion_model.input"),
        (changed(lambda t: t.pop(f"{UNET_PREFIX}out.2.bias")), r"1 missing \(model.*out.2.bias"),
        (changed(lambda t: t.update({"surprise.weight": torch.ones(1)})), r"1 extra \(surprise"),
        (changed(lambda t: t.update({f"{UNET_PREFIX}out.2.bias": torch.zeros(3)})),
         r"1 of wrong shape \(model.diffusion_model.out.2.bias \(3,\) instead of \(4,\)"),
        (changed(lambda t: t.update({CONV_IN: torch.zeros(16, 9, 3, 3)})),
         "in_channels is 9, expected 4 .text-to-image. or 8 .edit model."),
    ],
)  # fmt: skip
def test_files_that_are_no_such_model_are_refused_by_name(tmp_path, write, message):
    write(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        convert(str(tmp_path / "model.safetensors"), tmp_path / "out", config=str(FOLDER))
    assert not (tmp_path / "out").exists()


def test_other_widths_than_those_of_1x_need_a_config(tmp_path):
    with pytest.raises(InputError, match="text states of width 32, not the 768 .* with --config"):
        convert(str(LDM), tmp_path / "out")


def test_2x_cannot_become_a_single_file(tmp_path):
    with pytest.raises(InputError, match="2.x cannot be written as a single file"):
        convert(str(GOLDEN / "diffusers_v2"), tmp_path / "out.safetensors", to="ldm")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_exists_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    convert(str(FOLDER), tmp_path / "out")  # an empty folder is as good as none
    with pytest.raises(InputError, match="exists already: remove it"):
        convert(str(FOLDER), tmp_path / "out")
    with pytest.raises(InputError, match="does not end in .safetensors"):
        convert(str(FOLDER), tmp_path / "out.ckpt", to="ldm")


def test_failure_while_writing_leaves_no_folder(tmp_path, monkeypatch):
    def fail(self, folder):
        raise InputError("disk full")

    monkeypatch.setattr(UNet, "save", fail)
    with pytest.raises(InputError, match="disk full"):
        convert(str(FOLDER), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unknown_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="does not exist: expected a checkpoint file"):
        convert(str(tmp_path / "nowhere.ckpt"), tmp_path / "out")
