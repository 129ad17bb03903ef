"""Published config files are data: typed, bounded, never interpolated."""

import json
import shutil
import time

import pytest

from ipx2p.diffusion.schedule import ScheduleConfig
from ipx2p.errors import InputError
from ipx2p.files import read_json
from ipx2p.models.text import TextEncoder
from ipx2p.models.unet import UNet
from ipx2p.models.vae import VAE
from ipx2p.tensor_files.tensors import read_tensors
from tests.conftest import GOLDEN

UNET, VAE_FILE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULE = "scheduler/scheduler_config.json"
READERS = {
    UNET: lambda folder: UNet.load(folder / "unet"),
    VAE_FILE: lambda folder: VAE.load(folder / "vae"),
    TEXT: TextEncoder.load,
    SCHEDULE: ScheduleConfig.load,
}


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden model's small files."""
    return shutil.copytree(
        GOLDEN / "diffusers", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )


def change(folder, file, **fields):
    raw = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(raw | fields))


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        (UNET, "layers_per_block", 10_000_000),
        (UNET, "sample_size", 10_000_000),
        (UNET, "sample_size", -1),
        (UNET, "transformer_layers_per_block", 10_000_000),
        (UNET, "cross_attention_dim", 10**9),
        (UNET, "block_out_channels", [10**9] * 4),
        (UNET, "block_out_channels", [16] * 10_000),
        (UNET, "block_out_channels", []),
        (UNET, "norm_num_groups", 0),
        (UNET, "norm_eps", 1e400),
        (UNET, "attention_head_dim", 10**30),
        (VAE_FILE, "layers_per_block", 10_000_000),
        (VAE_FILE, "block_out_channels", [10**9] * 4),
        (VAE_FILE, "norm_num_groups", -1),
        (VAE_FILE, "scaling_factor", float("nan")),
        (TEXT, "num_hidden_layers", 10_000_000),
        (TEXT, "hidden_size", 10**9),
        (TEXT, "vocab_size", 10**12),
        (TEXT, "max_position_embeddings", 10**12),
        (TEXT, "intermediate_size", "wide"),
        (TEXT, "num_attention_heads", None),
        (TEXT, "layer_norm_eps", None),
        (TEXT, "eos_token_id", [1, 2]),
        (SCHEDULE, "num_train_timesteps", 10_000_000_000),
        (SCHEDULE, "steps_offset", -1),
        (SCHEDULE, "beta_end", 10**400),
    ],
)
def test_sizes_out_of_bounds_are_refused_at_once_by_field(folder, file, field, value):
    change(folder, file, **{field: value})
    name = "num_attention_heads" if field == "attention_head_dim" else field
    start = time.monotonic()
    with pytest.raises(InputError, match=rf"config\.json: {name} (is|has) .*expected") as raised:
        READERS[file](folder)
    assert time.monotonic() - start < 5  # it was never
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("layers_per_block", "2", "int"),
        ("layers_per_block", True, "int"),
        ("norm_eps", "small", "float"),
        ("use_linear_projection", 1, "bool"),
        ("sample_size", "64", r"int \| None"),
        ("down_block_types", "DownBlock2D", r"list\[str\]"),
        ("block_out_channels", [16, "32", 32, 32], r"list\[int\]"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_is_expected(folder, field, value, expected):
    change(folder, UNET, **{field: value})
    with pytest.raises(InputError, match=f"{field} is .*, expected {expected}$"):
        READERS[UNET](folder)


def test_fields_that_matter_elsewhere_are_written_back(folder, tmp_path):
    change(folder, UNET, upcast_attention=True)
    config = UNet.config_type.read(folder / UNET)
    config.write(tmp_path / "unet.json")
    assert read_json(tmp_path / "unet.json")["upcast_attention"] is True


def test_a_field_with_a_hostile_name_is_refused_in_one_line(folder):
    change(folder, VAE_FILE, **{"\x1b[2Jall\nis well": 3})
    with pytest.raises(InputError, match="not known here") as raised:
        READERS[VAE_FILE](folder)
    assert str(raised.value).isprintable()


def interpolated(value, text):
    """The value with `text` in the place of every string, number and truth in it."""
    if isinstance(value, dict):
        return {key: interpolated(entry, text) for key, entry in value.items()}
    return [interpolated(v, text) for v in value] if isinstance(value, list) else text


@pytest.mark.parametrize("text", ["${oc.env:IPX2P_SECRET}", "${", "${nowhere}", "${oc.env:NO}"])
@pytest.mark.parametrize("file", READERS)
def test_json_is_never_interpolated(folder, monkeypatch, file, text):
    monkeypatch.setenv("IPX2P_SECRET", "hunter2")
    for name, value in json.loads((folder / file).read_text()).items():
        change(folder, file, **{name: interpolated(value, text)})
        try:
            READERS[file](folder)
        except InputError as error:
            assert "hunter2" not in str(error) and str(error).isprintable(), name
        shutil.copy(GOLDEN / "diffusers" / file, folder / file)


def test_an_index_of_shards_is_never_interpolated(tmp_path, monkeypatch):
    monkeypatch.setenv("IPX2P_SECRET", "hunter2")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "${oc.env:IPX2P_SECRET}"}}))
    with pytest.raises(InputError, match=r"\$\{oc\.env:IPX2P_SECRET\}"):
        read_tensors(path)


def test_any_json_is_read_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("IPX2P_SECRET", "hunter2")
    (tmp_path / "sweep.json").write_text('{"a": "${oc.env:IPX2P_SECRET}", "b": ["${a}"]}')
    assert read_json(tmp_path / "sweep.json") == {"a": "${oc.env:IPX2P_SECRET}", "b": ["${a}"]}
