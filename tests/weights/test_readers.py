"""What a SOURCE is: file, folder, hub id in huggingface_hub's cache."""

import shutil

import pytest

from ipx2p.errors import InputError
from ipx2p.weights.readers import find_folder, find_source, find_tokenizer
from tests.conftest import GOLDEN


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that holds owner/model; notes what is asked of it."""
    asked = []

    def snapshot_download(hub_id, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        if hub_id != "owner/model":
            raise OSError("404: there is no such repository\nsecond line")
        return str(tmp_path / "snapshot")

    shutil.copytree(GOLDEN / "diffusers", tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_what_is_here_is_never_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert find_source("owner/model").resolve() == tmp_path / "owner" / "model"
    assert hub == []


def test_hub_id_gives_its_snapshot(hub, tmp_path):
    assert find_folder("owner/model") == tmp_path / "snapshot"
    assert len(hub) == 1 and "unet/*.safetensors" in hub[0] and "unet/*.bin" not in hub[0]
    assert "config.json" in hub[0]  # of a repository that is an autoencoder alone


@pytest.mark.parametrize(
    ("part", "name"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")]
)
def test_parts_without_safetensors_are_fetched_as_bin_files(hub, tmp_path, part, name):
    (tmp_path / "snapshot" / part / f"{name}.safetensors").unlink()
    find_source("owner/model")
    assert len(hub) == 2 and [p for p in hub[1] if p.endswith(".bin")] == [f"{part}/*.bin"]


def test_tokenizer_comes_from_a_hub_id_too(hub, tmp_path):
    assert find_tokenizer("owner/model") == tmp_path / "snapshot" / "tokenizer"


def test_hub_that_does_not_give_is_reported_in_one_line(hub):
    with pytest.raises(InputError, match="neither .* from the hub: 404.*repository$"):
        find_source("owner/other")


@pytest.mark.parametrize("source", ["nowhere.ckpt", "a/b.safetensors", "./x/y", "a/b/c", "name"])
def test_what_cannot_be_a_hub_id_is_not_looked_for_there(hub, source):
    with pytest.raises(InputError, match="does not exist: expected a checkpoint file, a weights"):
        find_source(source)
    assert hub == []


def test_single_file_where_a_folder_is_needed_is_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"is a single file.*run convert_weights\.py"):
        find_folder(GOLDEN / "ldm.safetensors")


@pytest.mark.parametrize(
    "source",
    [
        "https://huggingface.co/timbrooks/instruct-pix2pix",
        "https://huggingfa",
        "https:/huggingface.co/timbrooks",
        "huggingface.co/timbrooks",
        "hf.co/timbrooks/instruct-pix2pix",
        "www.huggingface.co/x",
        "HTTP://example.org/model.ckpt",
    ],
)
def test_a_web_address_or_half_of_one_is_refused_with_what_to_give(hub, source):
    with pytest.raises(InputError, match=r"is a web address: give the hub id in it, OWNER/NAME"):
        find_source(source)
    assert hub == []


@pytest.mark.parametrize("find", [find_source, find_folder])
def test_a_run_folder_is_pointed_to_its_weights(find, tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "weights" / "unet").mkdir(parents=True)
    with pytest.raises(InputError, match=rf"a run: name its weights, {tmp_path / 'weights'}$"):
        find(tmp_path)
    assert find_folder(tmp_path / "weights") == tmp_path / "weights"
