"""One reader and writer of named tensors: any format in, whole safetensors files out."""

import json
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ipx2p import files
from ipx2p.errors import InputError
from ipx2p.files import write_json
from ipx2p.tensor_files import tensors as module_under_test
from ipx2p.tensor_files.tensors import (
    NETWORK_STEMS,
    TEXT_STEMS,
    WEIGHTS_SUFFIXES,
    copy_tensors,
    find_weights,
    load_strict,
    read_tensors,
    save_tensors,
)

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2).half()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal keys, dtypes, shapes and bits."""

    def content(x: torch.Tensor):
        return x.dtype, x.shape, x.detach().contiguous().flatten().view(torch.uint8).tolist()

    return a.keys() == b.keys() and all(content(a[key]) == content(b[key]) for key in a)


def save(kind: str, path: Path, weights=WEIGHTS) -> Path:
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    return path


KINDS = ["safetensors", "zip", "legacy"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.ckpt", "a.pt", "a"])
def test_the_content_of_a_file_decides_not_its_name(tmp_path, kind, name):
    assert same(read_tensors(save(kind, tmp_path / name)), WEIGHTS)


def test_the_state_dict_of_a_checkpoint_is_taken_and_other_entries_dropped(tmp_path):
    path = tmp_path / "a.ckpt"
    other = {"optimizer": {"state": {0: torch.ones(3)}}, "loss": torch.ones(1), "global_step": 7}
    torch.save({"state_dict": {**WEIGHTS, "version": 3, "nested": {"x": 1}}, **other}, path)
    assert same(read_tensors(path), WEIGHTS)
    torch.save({**WEIGHTS, "epoch": 3, 4: torch.ones(1)}, path)
    assert same(read_tensors(path), WEIGHTS)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model": {"w": torch.ones(1)}, "step": 3}, "model, step"),
        ({f"key{i}": i for i in range(20)}, r"key11, \.\.\."),
        ({"state_dict": {"n": 1}, "step": 3}, "state_dict, step"),
        ({}, "nothing"),
        ([torch.ones(1)], "nothing"),
        (torch.ones(1), "nothing"),
    ],
)
def test_a_file_without_named_tensors_lists_its_top_level(tmp_path, content, expected):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=f"no named tensors.*{expected}: save the state dict"):
        read_tensors(tmp_path / "a.ckpt")
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="holds no tensors"):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_read_can_be_written_to_and_the_file_stays(tmp_path, kind):
    path = save(kind, tmp_path / "a")
    content = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_tensors(path)
        found["a.weight"].add_(1)
    assert path.read_bytes() == content
    assert torch.equal(found["a.weight"], WEIGHTS["a.weight"] + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_may_be_replaced_by_what_was_read_from_it(tmp_path, kind):
    path = save(kind, tmp_path / "a")
    found = read_tensors(path)
    save_tensors(found, path)
    assert same(found, WEIGHTS)
    assert same(read_tensors(path), WEIGHTS)


# Files that are not what they should be.


def cut(size: int):
    return lambda path: path.write_bytes(save("safetensors", path).read_bytes()[:size])


def wrong_header(path: Path) -> None:
    content = bytearray(save("safetensors", path).read_bytes())
    content[12] = 0xFF
    path.write_bytes(content)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HTML = "\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
BAD_FILES = {
    "missing": (lambda path: None, "No such file"),
    "folder": (Path.mkdir, "a folder"),
    "pipe": (os.mkfifo, "device where a file"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "empty": (Path.touch, "is empty: download it again"),
    "git-lfs": (lambda path: path.write_text(LFS), "a git-lfs pointer.*run git lfs pull"),
    "HTML": (lambda path: path.write_text(HTML), "an HTML page, not weights"),
    "text": (lambda path: path.write_text("Entry not found é"), "text, not weights"),
    "JSON": (lambda path: path.write_text('{"a": 1}'), "text, not weights"),
    "tiny binary": (lambda path: path.write_bytes(b"\0\1\2"), "cut short|not a torch checkpoint"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "torch.save did not"),
    "safetensors without its last byte": (cut(-1), "damaged or cut short"),
    "safetensors without data": (cut(-36), "damaged or cut short"),
    "safetensors within the header": (cut(20), "damaged or cut short"),
    "safetensors with a wrong header": (wrong_header, "damaged or cut short"),
    "truncated zip": (
        lambda path: path.write_bytes(save("zip", path).read_bytes()[:-100]),
        "damaged or cut short",
    ),
    "truncated legacy": (
        lambda path: path.write_bytes(save("legacy", path).read_bytes()[:-1]),
        "damaged or cut short",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_bad_files_are_refused_in_one_line(tmp_path, kind, name):
    make, expected = BAD_FILES[kind]
    make(tmp_path / name)
    with pytest.raises(InputError, match=expected) as caught:
        read_tensors(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def as_nobody(action) -> int:
    """Run `action` in a process that has no rights; its exit code is 3 for an InputError."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            action()
            code = 0
        except InputError as error:
            code = 3 if "Permission denied" in str(error) else 4
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_unreadable_and_unwritable_paths_are_input_errors(tmp_path):
    path = save("safetensors", tmp_path / "a.safetensors")
    path.chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    tmp_path.chmod(0o555)
    assert as_nobody(lambda: read_tensors(path)) == 3
    assert as_nobody(lambda: save_tensors({}, tmp_path / "b.safetensors")) == 3
    assert as_nobody(lambda: find_weights(tmp_path / "closed")) == 3
    tmp_path.chmod(0o755)


# Shards and folders.


def shards(folder: Path, suffix="safetensors", **changes) -> Path:
    weight_map = {}
    for i, (key, value) in enumerate(WEIGHTS.items(), start=1):
        name = f"model-0000{i}-of-00002.{suffix}"
        save(
            "zip" if suffix == "bin" else suffix,
            folder / name,
            {key: value, "other": torch.ones(1)},
        )
        weight_map[key] = name
    path = folder / f"model.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {**weight_map, **changes}}))
    return path


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_as_one_file(tmp_path, suffix):
    assert same(read_tensors(shards(tmp_path, suffix)), WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"b": "model-00003-of-00003.bin"}, "1 of its 3 shards are missing .model-00003"),
        ({"b": "model-00001-of-00002.safetensors"}, r"1 of its 3 tensors are missing \(b\)"),
        ({"b": "../model.safetensors"}, r"outside its folder: \.\./model"),
        ({"b": "/etc/passwd"}, "outside its folder"),
        ({"b": ".."}, "a folder"),
        ({"b": None}, "shards are missing"),
    ],
)
def test_an_index_must_be_true(tmp_path, changes, expected):
    with pytest.raises(InputError, match=expected):
        read_tensors(shards(tmp_path, **changes))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"weight_map": []}', '{"a": {}}', LFS, HTML, "[" * 100_000]
)
def test_a_broken_index_is_an_input_error(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(InputError, match="not an index of shards"):
        read_tensors(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not an index of shards"):
        read_tensors(path)


@pytest.mark.parametrize("stems", [NETWORK_STEMS, TEXT_STEMS])
def test_weights_are_found_in_order_of_preference(tmp_path, stems):
    names = [f"{stem}{suffix}" for suffix in WEIGHTS_SUFFIXES for stem in stems]
    (tmp_path / "config.json").touch()
    for name in reversed(names):
        (tmp_path / name).touch()
        assert find_weights(tmp_path, stems) == tmp_path / name
    assert names.index(f"{stems[-1]}.bin") < names.index(f"{stems[0]}.fp16.safetensors")


def test_missing_weights_name_what_was_looked_for_and_what_is_there(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "flax_model.msgpack").touch()
    with pytest.raises(InputError, match=r"model or pytorch_model.*config\.json, flax_model"):
        find_weights(tmp_path, TEXT_STEMS)
    with pytest.raises(InputError, match="No such file"):
        find_weights(tmp_path / "absent")


def test_a_variant_index_is_read_as_an_index(tmp_path):
    path = shards(tmp_path).rename(tmp_path / "model.safetensors.index.fp16.json")
    assert find_weights(tmp_path, TEXT_STEMS) == path
    assert same(read_tensors(path), WEIGHTS)


# Strict loading.


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_takes_the_tensors_as_they_are(device):
    expected = network().half().state_dict()
    with torch.device(device):
        module = network()
    load_strict(module, expected, "a.safetensors")
    assert same(module.state_dict(), expected)
    assert module[0].weight.dtype == torch.float16 and module[0].weight.requires_grad
    assert isinstance(module[0].weight, nn.Parameter)
    assert module[0].weight.data_ptr() == expected["0.weight"].data_ptr()
    assert not any(tensor.is_meta for tensor in module.state_dict().values())


def test_one_report_names_all_keys_that_do_not_fit():
    tensors = network().state_dict()
    del tensors["0.bias"]
    tensors |= {f"extra.{i}": torch.ones(1) for i in range(5)}
    tensors["0.weight"] = torch.zeros(2, 8, 3, 3)
    tensors["1.weight"] = torch.zeros(2, dtype=torch.int64)
    module = network()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_strict(module, tensors, "unet/a.safetensors")
    assert str(caught.value) == (
        "unet/a.safetensors does not fit the model: 1 missing (0.bias); "
        "5 extra (extra.0, extra.1, extra.2, ...); "
        "1 of wrong shape (0.weight (2, 8, 3, 3) instead of (2, 4, 3, 3)); "
        "1 of wrong kind (1.weight torch.int64 instead of torch.float32)"
    )
    assert same(module.state_dict(), before)


def test_hostile_names_are_printed_safely():
    with pytest.raises(InputError) as caught:
        load_strict(nn.Identity(), {"\x1b[31m\n\udc80" + "x" * 500: torch.ones(1)}, "a")
    assert str(caught.value).isascii() and "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


# Writing.


def test_values_are_written_bit_for_bit(tmp_path):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int8]
    dtypes += [torch.bool, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(dtype): base.to(dtype) for dtype in dtypes}
    tensors |= {"transposed": base.t(), "strided": base[::2, 1::2], "row": base[2]}
    tensors |= {"expanded": base[0].expand(3, 6), "scalar": torch.tensor(3), "same row": base[2]}
    tensors |= {"empty": torch.empty(0, 3), "empty too": torch.empty(0), "tied": base}
    tensors |= {"part": torch.arange(10.0)[3:7], "rest": torch.arange(10.0)[5:]}
    tensors |= {"nan": torch.tensor([float("nan"), -0.0]), "parameter": nn.Parameter(base)}
    tensors |= {"channels last": base.view(1, 4, 2, 3).to(memory_format=torch.channels_last)}
    before = {key: value.detach().clone() for key, value in tensors.items()}
    save_tensors(tensors, tmp_path / "a.safetensors")
    assert same(load_file(tmp_path / "a.safetensors"), before)
    assert same(read_tensors(tmp_path / "a.safetensors"), before)
    assert same(tensors, before)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_get_the_rights_that_the_umask_gives(tmp_path):
    umask = os.umask(0o027)
    try:
        save_tensors(WEIGHTS, tmp_path / "a.safetensors")
        write_json({}, tmp_path / "a.json")
    finally:
        os.umask(umask)
    rights = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert rights == {0o640}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("module", "at"), [(module_under_test, "_write"), (files, "flush_to_disk")]
)
def test_a_failed_write_leaves_the_earlier_file_alone(tmp_path, monkeypatch, error, module, at):
    path = tmp_path / "a.safetensors"
    save_tensors(WEIGHTS, path)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(module, at, fail)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_tensors({"b": torch.ones(1)}, path)
    assert expected is KeyboardInterrupt or "No space left on device: free some" in str(
        caught.value
    )
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert same(read_tensors(path), WEIGHTS)


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from ipx2p.errors import InputError
from ipx2p.files import write_json
from ipx2p.tensor_files.tensors import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (
    lambda path: save_tensors({"a": torch.zeros(100_000)}, path / "a.safetensors"),
    lambda path: write_json({"a": "a" * 200_000}, path / "a.json"),
):
    try:
        write(Path(sys.argv[1]))
    except InputError as error:
        print(error)
"""


def test_a_full_disk_is_an_input_error(tmp_path):
    """A limit on the file's size stands for the end of the disk."""
    for name in ("a.safetensors", "a.json"):
        (tmp_path / name).write_text("earlier")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    root = Path(module_under_test.__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and all("File too large" in line for line in lines)
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.safetensors"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"earlier"}


def test_paths_that_cannot_be_written_are_input_errors(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a", tmp_path / "folder"):
        with pytest.raises(InputError, match=f"cannot write {path}: .*choose another place"):
            save_tensors(WEIGHTS, path)
        with pytest.raises(InputError, match="cannot write"):
            write_json({}, path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# Memory.


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages in /proc")
def test_only_tensors_in_use_take_memory(tmp_path):
    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    path = tmp_path / "a.safetensors"
    save_tensors({str(i): torch.full((2**21,), float(i)) for i in range(16)}, path)  # 128 MiB
    before = resident_mib()
    found = read_tensors(path)
    with torch.device("meta"):
        module = nn.ParameterList([nn.Parameter(torch.empty(2**21)) for _ in range(16)])
    load_strict(module, found, "a")
    assert resident_mib() - before < 16
    assert module[3].sum() == 3 * 2**21
    assert resident_mib() - before < 32


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in /proc")
def test_writing_takes_the_memory_of_one_tensor(tmp_path):
    """In another memory layout than the file's, as the convolutions of a network in training."""
    shape = (64, 64, 32, 16)  # 8 MiB
    tensors = {
        str(i): torch.full(shape, float(i)).to(memory_format=torch.channels_last) for i in range(16)
    }
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    peaks_kib = []
    for path in (None, tmp_path / "a.safetensors"):
        if path is not None:
            save_tensors(tensors, path)
        status = Path("/proc/self/status").read_text()
        peaks_kib.append(int(re.search(r"VmHWM:\s+(\d+)", status)[1]))
    assert peaks_kib[1] - peaks_kib[0] < 24 * 1024
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["3"], tensors["3"])


def test_copying_a_file_keeps_dtypes_and_checks_names(tmp_path):
    save_tensors(WEIGHTS, tmp_path / "w")
    held = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in WEIGHTS.items()}
    copy_tensors(held, tmp_path / "w")
    assert all(torch.equal(held[name], WEIGHTS[name].float()) for name in WEIGHTS)
    assert same(read_tensors(tmp_path / "w"), WEIGHTS)  # the file is as it was
    del held["a.bias"]
    with pytest.raises(InputError, match=r"1 extra \(a.bias"):
        copy_tensors(held, tmp_path / "w")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux")
def test_copying_a_file_takes_no_memory_beside_the_copy(tmp_path):
    probe = (
        "import resource, sys, torch\n"
        "from ipx2p.tensor_files.tensors import copy_tensors, save_tensors\n"
        "held = {str(i): torch.ones(1024, 1024) for i in range(64)}\n"
        "save_tensors(held, sys.argv[1])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "copy_tensors(held, sys.argv[1])\n"
        "print(peak() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path / "w")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 64 * 4096 / 4  # KiB: a quarter of the file
