"""Checkpoints load with nothing of them executed, whatever their pickle holds.

Hostile files are written instruction by instruction. A payload creates a marker file; each one is
also shown to work under Python's own unpickler, so that the silence of a test means something.
"""

import builtins
import collections
import contextlib
import copy
import copyreg
import gc
import os
import pickle
import pickletools
import random
import resource
import struct
import sys
import tarfile
import time
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ipx2p.errors import InputError
from ipx2p.tensor_files import torch_file, unpickle
from ipx2p.tensor_files.tensors import read_tensors
from ipx2p.tensor_files.torch_file import read_checkpoint
from ipx2p.tensor_files.unpickle import Global, StandIn, Storage, entries

MAGIC = 0x1950A86A20F9469CFC6C
PROTO2, PROTO4 = b"\x80\x02", b"\x80\x04"


def dump(value: object) -> bytes:
    """The instructions that make a plain value, without PROTO, memo and STOP."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def short_unicode(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def storage(kind="FloatStorage", key="0", numel=4, view=None, legacy=False) -> bytes:
    items = [dump("storage"), name("torch", kind), dump(key), dump("cpu"), dump(numel)]
    items += [dump(view)] if legacy else []
    return b"(" + b"".join(items) + b"tQ"


def tensor(base=None, offset=0, size=(4,), stride=(1,)) -> bytes:
    base = storage() if base is None else base
    args = [base, dump(offset), dump(size), dump(stride), b"\x89", b"}"]
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + b"".join(args) + b"tR"


def write_zip(path, program, storages=None, prefix="archive/", kind=zipfile.ZIP_STORED, **more):
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr(f"{prefix}data.pkl", program)
        for key, content in (storages or {}).items():
            archive.writestr(f"{prefix}data/{key}", content)
        for key, content in more.items():
            archive.writestr(f"{prefix}{key}", content)
    return path


def write_legacy(path, program, storages=None):
    content = [pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": True})]
    content += [program, pickle.dumps([*(storages or {})], 2)]
    content += [struct.pack("<q", len(s) // 4) + s for s in (storages or {}).values()]
    path.write_bytes(b"".join(content))
    return path


WRITERS = {"zip": write_zip, "legacy": write_legacy}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    return lambda program, **more: WRITERS[request.param](tmp_path / "a.ckpt", program, **more)


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request, tmp_path):
    """torch.save in one of the two formats; returns the path."""

    def save(value, **more):
        path = tmp_path / "saved.ckpt"
        torch.save(value, path, _use_new_zipfile_serialization=request.param, **more)
        return path

    return save


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, layout and every bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape) or (a.numel() and a.stride() != b.stride()):
        return False
    a, b = (x.detach().resolve_conj().resolve_neg().contiguous().flatten() for x in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# What torch.save writes comes back as torch.load gives it.

NORMAL = {
    **{
        str(dtype): torch.arange(6, dtype=torch.float32).view(2, 3).to(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64),
            *(torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
            torch.complex128,
        )
    },
    "view": torch.arange(10.0)[3:7],
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "strided": torch.arange(24.0).view(4, 6)[::2, 1::3],
    "expanded": torch.arange(3.0).expand(4, 3),
    "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negative": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "scalar": torch.tensor(7),
    "empty": torch.empty(0),
    "empty 2d": torch.empty(0, 5),
    "empty tail": torch.arange(4.0)[4:],
    "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    "parameter": nn.Parameter(torch.ones(2, 2)),
    "buffer": nn.BatchNorm1d(2).state_dict()["num_batches_tracked"],
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_normal_checkpoints_equal_torch_load(save, protocol):
    path = save(NORMAL, pickle_protocol=protocol)
    expected, found = torch.load(path, weights_only=False), read_checkpoint(path)
    assert expected.keys() == found.keys()
    assert [key for key, value in expected.items() if not same(value, found[key])] == []
    assert {type(value) for value in found.values()} == {torch.Tensor}
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_dtypes_without_a_storage_type_are_read(save, dtype):
    """torch.load itself cannot read these in the old format."""
    values = torch.tensor([1.0, 2.0]).to(dtype)
    assert same(read_checkpoint(save(values)), values)


def test_state_dicts_and_plain_values_come_back_plain(save):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    plain = {"epoch": 3, "lr": 1e-4, "name": "é", "on": [True, None], "t": (1, (2,)), "b": b"\xff"}
    found = read_checkpoint(save({"state_dict": model.state_dict(), "dtype": torch.half, **plain}))
    assert type(found["state_dict"]) is dict  # its _metadata is dropped
    assert all(same(v, found["state_dict"][k]) for k, v in model.state_dict().items())
    assert found["dtype"] is torch.float16
    assert {key: found[key] for key in plain if key != "b"} == {
        key: value for key, value in plain.items() if key != "b"
    }


def test_tied_tensors_share_memory_and_others_do_not(save):
    base = torch.arange(6.0)
    path = save({"a": base, "b": base, "row": base.view(2, 3)[1], "other": torch.arange(6.0)})
    found = read_checkpoint(path)
    found["a"][4] = -1
    assert found["b"][4] == found["row"][1] == -1
    assert found["other"][4] == 4


def test_bare_storages_and_sizes_are_inert_values(save):
    found = read_checkpoint(save([torch.arange(3.0).untyped_storage(), torch.Size([2, 3])]))
    assert type(found[0]) is Storage and found[0].data.numel() == 12
    assert found[1] == (2, 3)


def test_old_storage_views_are_read(tmp_path):
    content = torch.arange(6.0).numpy().tobytes()
    view = storage(numel=6, view=("v", 2, 3), legacy=True)
    program = PROTO2 + tensor(view, offset=1, size=(2,)) + b"."
    path = write_legacy(tmp_path / "a.ckpt", program, {"0": content})
    assert read_checkpoint(path).tolist() == [3, 4]
    program = PROTO2 + tensor(view, size=(4,)) + b"."  # inside the storage, but not the view
    with pytest.raises(InputError, match="overruns its storage of 3 values"):
        read_checkpoint(write_legacy(path, program, {"0": content}))
    program = PROTO2 + storage(numel=6, view=("v", 4, 3), legacy=True) + b"."
    with pytest.raises(InputError, match="overruns its storage"):
        read_checkpoint(write_legacy(path, program, {"0": content}))


def test_tensors_saved_on_a_gpu_load_on_the_cpu(write):
    base = dump("storage") + name("torch.cuda", "FloatStorage") + dump("0") + dump("cuda:0")
    program = PROTO2 + tensor(b"(" + base + dump(2) + b"tQ", size=(2,)) + b"."
    content = torch.tensor([1.5, -2]).numpy().tobytes()
    found = read_checkpoint(write(program, storages={"0": content}))
    assert same(found, torch.tensor([1.5, -2]))


# Trainer objects load without their packages.


@pytest.fixture
def trainer(monkeypatch):
    """Fake packages as trainers use them; `trainer.forget()` uninstalls them."""
    lightning, omega = types.ModuleType("fake_lightning"), types.ModuleType("fake_omegaconf")

    def define(module, name, bases=(), **members):
        made = type(name, bases, {"__module__": module.__name__, **members})
        setattr(module, name, made)
        return made

    define(lightning, "ModelCheckpoint")
    define(lightning, "AttributeDict", (dict,))
    define(lightning, "Slotted", __slots__=("path", "best"))
    define(lightning, "Items", (list,))
    define(lightning, "Point", (collections.namedtuple("Point", "x y"),))
    define(lightning, "Ordered", (collections.OrderedDict,))
    define(omega, "DictConfig", __getstate__=lambda self: {"_content": {"lr": omega.AnyNode()}})
    define(omega, "AnyNode", __reduce__=lambda self: (omega.DictConfig, (), {"_val": 1e-4}))
    for module in (lightning, omega):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def forget():
        for module in (lightning, omega):
            monkeypatch.delitem(sys.modules, module.__name__)

    return types.SimpleNamespace(lightning=lightning, omega=omega, forget=forget)


def test_trainer_objects_load_without_their_packages(save, trainer):
    pl, slotted = trainer.lightning, trainer.lightning.Slotted()
    slotted.best, slotted.path = torch.ones(2), "x"
    weights = {"a.weight": torch.arange(3.0)}
    path = save(
        {
            "state_dict": weights,
            "callbacks": {pl.ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}},
            "hyper_parameters": pl.AttributeDict(lr=1e-4, inner=pl.AttributeDict(a=[1])),
            "config": trainer.omega.DictConfig(),
            "objects": [pl.ModelCheckpoint(), slotted, pl.Items([1, 2]), pl.Point(1, 2)],
            "numpy": [np.float32(1.5), np.float64(2), np.int64(3), np.arange(4), np.array("a")],
            "builtin": [{1, 2}, frozenset({3}), bytearray(b"a"), b"b", 1j, range(3), slice(1)],
            "library": [
                collections.Counter("aab"),
                collections.defaultdict(list, a=[1]),
                os.getcwd,
            ],
            pl.ModelCheckpoint(): "an instance as a key",
            (1, "a"): "a tuple as a key",
        }
    )
    trainer.forget()
    found = read_checkpoint(path)
    assert same(found["state_dict"]["a.weight"], weights["a.weight"])
    (callback,) = found["callbacks"]
    assert callback == Global("fake_lightning", "ModelCheckpoint")
    assert found["callbacks"][callback]["best_model_score"] == 0.5
    assert found["hyper_parameters"]["inner"]["a"] == [1]
    assert type(found["hyper_parameters"]) is StandIn
    assert type(entries(found["config"])["_content"]["lr"]) is StandIn
    assert entries(found["objects"][1])["path"] == "x"
    assert found["objects"][2].appended == [1, 2]
    assert found["library"][1]["a"] == [1]
    assert all(type(value) is StandIn for value in found["numpy"])
    assert len(found) == 10 and "a tuple as a key" in found.values()
    assert not {"fake_lightning", "fake_omegaconf"} & sys.modules.keys()
    assert list(read_tensors(path)) == ["a.weight"]


@pytest.mark.parametrize("kind", ["AttributeDict", "Ordered"])
def test_a_state_dict_inside_a_dict_subclass_is_found(save, trainer, kind):
    made = getattr(trainer.lightning, kind)
    path = save(made(state_dict=made(w=torch.ones(2)), step=1))
    trainer.forget()
    assert read_tensors(path)["w"].tolist() == [1, 1]


def test_omegaconf_settings_load_without_omegaconf(save, monkeypatch):
    config = pytest.importorskip("omegaconf").OmegaConf.create({"a": [1, {"b": "${a}"}], "c": None})
    path = save({"hyper_parameters": config, "state_dict": {"w": torch.ones(2)}})
    for module in [name for name in sys.modules if name.split(".")[0] == "omegaconf"]:
        monkeypatch.setitem(sys.modules, module, None)
    assert read_tensors(path)["w"].tolist() == [1, 1]
    assert "_content" in entries(read_checkpoint(path)["hyper_parameters"])


def test_a_state_dict_among_attributes_is_found(save, trainer):
    holder = trainer.lightning.ModelCheckpoint()
    holder.state_dict = {"w": torch.ones(2)}
    path = save(holder)
    trainer.forget()
    assert read_tensors(path)["w"].tolist() == [1, 1]


def test_ordered_dicts_of_python_2_are_read(write):
    pairs = b"](](U\x01w" + tensor() + b"e" + b"e"  # 8-bit strings, a list of [key, value]
    inner = name("collections", "OrderedDict") + pairs + b"\x85R"
    path = write(PROTO2 + b"}U\x0astate_dict" + inner + b"s.", storages={"0": bytes(16)})
    assert read_tensors(path)["w"].tolist() == [0, 0, 0, 0]


def test_dict_subclasses_of_protocol_0_are_read(write):
    args = name("any", "Dict") + name("__builtin__", "dict") + b"}U\x01w" + tensor() + b"s"
    program = name("copy_reg", "_reconstructor") + b"(" + args + b"tR."
    path = write(PROTO2 + program, storages={"0": bytes(16)})
    assert read_tensors(path)["w"].tolist() == [0, 0, 0, 0]


def test_instances_made_in_any_way_are_inert(write):
    program = b"](cmod\nCls\nK\x01oa(K\x02imod\nCls\nacmod\nCls\nK\x03\x85}\x92a."
    found = read_checkpoint(write(PROTO4 + program))
    assert [value.made_by for value in found] == [Global("mod", "Cls")] * 3
    assert [value.args for value in found] == [(1,), (2,), ((3,), {})]


def test_a_pickled_module_is_inert_and_refused_as_weights(save):
    path = save(nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(read_checkpoint(path)) is StandIn
        with pytest.raises(InputError, match=r"no named tensors.*_parameters.*state dict"):
            read_tensors(path)


def test_unread_kinds_of_tensors_are_named(save):
    sparse = torch.eye(2).to_sparse()
    with pytest.raises(InputError, match=r"s \(torch\._utils\._rebuild_sparse_tensor\)"):
        read_tensors(save({"a": torch.ones(1), "s": sparse}))


# Nothing pickled runs.


def call(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def payloads(marker: Path) -> dict[str, bytes]:
    """Programs that create the marker when Python unpickles them."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    system, module = name("os", "system"), call(name("importlib", "import_module"), dump("os"))
    run = call(system, dump(command))
    return {
        "os.system": run,
        "posix.system": call(name("posix", "system"), dump(command)),
        "os.mkdir": call(name("os", "mkdir"), dump(str(marker))),
        "eval": call(name("builtins", "eval"), dump(code)),
        "exec": call(name("builtins", "exec"), dump(code)),
        "eval of Python 2": call(name("__builtin__", "eval"), dump(code)),
        "io.open": call(name("io", "open"), dump(str(marker)), dump("w")),
        "getoutput": call(name("subprocess", "getoutput"), dump(command)),
        "Popen": call(name("subprocess", "Popen"), dump(["touch", str(marker)])),
        "runpy": call(name("runpy", "run_path"), dump(str(marker.with_name("script.py")))),
        "timeit": call(
            name("timeit", "timeit"), dump(code), dump("0"), name("time", "time"), dump(1)
        ),
        "pickle.loads": call(name("pickle", "loads"), dump(PROTO2 + run + b".")),
        "torch.load": call(
            name("torch", "load"),
            dump(str(marker.with_name("second.ckpt"))),
            b"N",
            name("torch.serialization", "pickle"),
        ),
        "getattr": call(call(name("builtins", "getattr"), module, dump("system")), dump(command)),
        "partial": call(call(name("functools", "partial"), system, dump(command))),
        "methodcaller": call(
            call(name("operator", "methodcaller"), dump("system"), dump(command)), module
        ),
        "in an argument": call(name("builtins", "str"), run),
        "in a key": b"}" + run + b"Ns",
        "in a state": name("types", "SimpleNamespace") + b")R}" + dump("x") + run + b"sb",
        "in a tensor": name("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + b"".join([system, name("torch", "Tensor"), dump((command,)), b"}tR"]),
        "dotted name": short_unicode("torch")
        + short_unicode("os.system")
        + b"\x93"
        + dump((command,))
        + b"R",
        "INST": b"(" + dump(command) + b"ios\nsystem\n",
        "OBJ": b"(" + system + dump(command) + b"o",
    }


@pytest.fixture
def marker(tmp_path):
    marker = tmp_path / "payload" / "marker"
    marker.parent.mkdir()
    marker.with_name("script.py").write_text(f"open({str(marker)!r}, 'w').close()")
    program = PROTO2 + call(name("os", "system"), dump(f"touch {marker}")) + b"."
    write_zip(marker.with_name("second.ckpt"), program, version=b"3")
    return marker


def appears(path: Path, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return path.exists()


def world() -> dict:
    """What a hostile pickle might change: attributes of modules, classes and functions."""
    places = [builtins, collections.OrderedDict, copyreg, pickle, pickle._Unpickler, os, torch]
    places += [torch._utils, torch.Tensor, torch.serialization, torch.Size, unpickle, torch_file]
    places += [StandIn, Global, Storage, unpickle._Machine]
    held = {str(place): {key: id(value) for key, value in vars(place).items()} for place in places}
    for function in (torch._utils._rebuild_tensor_v2, *unpickle.REBUILD.values()):
        parts = (function.__code__, function.__defaults__, function.__dict__, function.__name__)
        held[str(function)] = repr(parts)
    environ = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    return held | {"environ": environ, "path": [*sys.path]}


@pytest.fixture
def unchanged():
    before = world()
    yield
    after = world()
    changed = [key for key in before if before[key] != after[key]]
    assert changed == []


def outcome(path: Path) -> object:
    """What a file gives: the object, or the InputError."""
    try:
        return read_checkpoint(path)
    except InputError as error:
        assert str(path) in str(error) and len(str(error)) < 1000 and "\n" not in str(error)
        return error


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of payloads that ran
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", [*payloads(Path("unused"))])
def test_no_payload_runs(tmp_path, marker, unchanged, kind):
    protocol = PROTO4 if kind == "dotted name" else PROTO2
    program = protocol + payloads(marker)[kind] + b"."
    for path in (tmp_path / "zip.ckpt", tmp_path / "legacy.ckpt", tmp_path / "zip.safetensors"):
        (write_legacy if "legacy" in path.name else write_zip)(path, program)
        outcome(path)
        with pytest.raises(InputError):
            read_tensors(path)
    path.write_bytes(program)
    outcome(path)
    assert not appears(marker, within_s=0.3 if kind == "Popen" else 0)
    with contextlib.suppress(Exception):  # what comes after the call may fail
        pickle.loads(program)
    assert appears(marker, within_s=5)  # so the payload was a working one


SLOTS = dump((None, {"__code__": 1, "__class__": 2, "update": 3, "data": None, "made_by": None}))
BUILDS = {
    "a rebuilding function": name("torch._utils", "_rebuild_tensor_v2") + SLOTS + b"b.",
    "a real class": name("collections", "OrderedDict") + SLOTS + b"b.",
    "a module": name("torch", "nn") + SLOTS + b"b.",
    "a dtype": name("torch", "float32") + SLOTS + b"b.",
    "a storage": storage(numel=0) + SLOTS + b"b.",
    "a list": b"]" + SLOTS + b"b.",
    "a string": dump("a") + SLOTS + b"b.",
    "items of a name": name("os", "environ") + dump("A") + dump("B") + b"s.",
    "items of a list": b"]" + dump(0) + dump("B") + b"s.",
    "items of a tensor": tensor(storage(numel=0), size=(0,)) + b"K\x00K\x01s.",
    "values of a name": name("sys", "path") + dump("A") + b"a.",
    "values of a dict": b"}(K\x01e.",
    "values of a tensor": tensor(storage(numel=0), size=(0,)) + b"(K\x01e.",
    "members of a name": name("sys", "path") + b"(K\x01\x90.",
    "a call of a number": b"K\x01)R.",
    "a call of a string": dump("os.system") + b")R.",
    "a call of a dtype": name("torch", "float32") + b")R.",
    "a call of a tensor": tensor(storage(numel=0), size=(0,)) + b")R.",
    "a call of a dict": b"})R.",
    "an object of a list": b"])\x81.",
    "an extension": b"\x82\xf0.",
    "an extension of 2 bytes": b"\x83\xf0\x00.",
    "an extension of 4 bytes": b"\x84\xf0\x00\x00\x00.",
    "a buffer from outside": b"\x97.",
    "a read-only buffer": b"\x96" + bytes(8) + b"\x98.",
    "an unknown instruction": b"\xff.",
    "a text persistent id": b"Pstorage\n.",
    "a number as persistent id": b"K\x01Q.",
    "an unknown persistent id": dump(("file", "/etc/passwd")) + b"Q.",
    "a storage of no kind": dump(("storage", "FloatStorage", "0", "cpu", 1)) + b"Q.",
    "a storage of an unknown kind": storage(kind="QInt8Storage") + b".",
    "a storage with a path as key": storage(key="../../../../etc/passwd") + b".",
    "a storage with a list as key": storage(key=["0"]) + b".",
    "a storage of negative size": storage(numel=-1) + b".",
    "a storage of huge size": storage(numel=2**61) + b".",
    "a tensor of no storage": tensor(b"N") + b".",
    "a tensor of a list": tensor(b"]") + b".",
    "a tensor without arguments": name("torch._utils", "_rebuild_tensor_v2") + b")R.",
    "a dtype that is none": name("torch._utils", "_rebuild_tensor_v3")
    + b"("
    + storage(numel=0)
    + b"K\x00))\x89}NtR.",
    "an empty stack": b".",
    "a missing mark": b"t.",
    "an unknown memo index": b"h\x05.",
    "an odd number of items": b"}(K\x01u.",
    "no end": b"N",
    "a wrong protocol": b"\x80\x63N.",
    "8-bit text as a name": b"c\xff\xfe\n\xff\n.",
}


@pytest.mark.parametrize("kind", BUILDS)
def test_misuse_of_instructions_is_refused(write, unchanged, monkeypatch, kind):
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("os", "getpid"))
    before = world()
    assert type(outcome(write(PROTO4 + BUILDS[kind], storages={"0": b""}))) is InputError
    assert world() == before


@pytest.mark.parametrize("target", ["}", "cos\nsystem\n)R", "\x8f"])
def test_state_of_inert_values_stays_inert(write, unchanged, target):
    value = outcome(write(PROTO4 + target.encode("latin1") + SLOTS + b"b."))
    assert type(value) in (dict, StandIn) and value.__class__ is type(value)
    if type(value) is StandIn:
        assert type(value.made_by) is Global and value.state[1]["made_by"] is None


def test_state_of_a_tensor_is_dropped(write, unchanged):
    value = outcome(write(PROTO2 + tensor() + SLOTS + b"b.", storages={"0": bytes(16)}))
    assert type(value) is torch.Tensor and value.tolist() == [0, 0, 0, 0]


def test_every_instruction_is_ours_or_plain():
    plain = {getattr(pickle, code)[0] for code in unpickle.PLAIN_INSTRUCTIONS.split()}
    base, machine = pickle._Unpickler.dispatch, unpickle._Machine.dispatch
    assert set(machine) == set(range(256))
    assert {code for code, function in machine.items() if base.get(code) is function} == plain
    real = {opcode.name for opcode in pickletools.opcodes if ord(opcode.code) in plain}
    acting = {"REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
    acting |= {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "DICT", "FROZENSET"}
    assert len(real) == len(plain) and not real & acting


# Sizes and depths that a file claims cost no more than the file.


@pytest.fixture
def little_memory():
    """The peak of resident memory grows by less than 200 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024


HUGE = struct.pack("<Q", 2**40)
CLAIMS = {
    "memo index": b"Nr\xfe\xff\xff\xff.",
    "decimal memo index": b"Np99999999999999999999\n.",
    "frame": b"\x95" + HUGE + b"N.",
    "bytes": b"\x8e" + HUGE + b"N.",
    "text": b"\x8d" + HUGE + b"N.",
    "bytearray": b"\x96" + HUGE + b"N.",
    "bytearray beyond 63 bits": b"\x96" + b"\xff" * 8 + b"N.",
    "number": b"\x8b\xff\xff\xff\x7fN.",
    "negative number": b"\x8b\xff\xff\xff\xffN.",
    "decimal number": b"L" + b"9" * 10**6 + b"L\n.",
    "storage": storage(numel=2**40) + b".",
    "many storages": b"".join(storage(key=str(i), numel=2**8) + b"0" for i in range(99)) + b"N.",
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_claimed_sizes_are_not_allocated(write, little_memory, kind):
    harmless = kind in ("memo index", "decimal memo index", "frame")
    value = outcome(write(PROTO4 + CLAIMS[kind]))
    assert type(value) is InputError or (harmless and value is None)


HOSTILE_VIEWS = [
    (-1, (1,), (1,)),
    (0, (5,), (1,)),
    (1, (4,), (1,)),
    (4, (), ()),
    (0, (4,), (-1,)),
    (0, (-4,), (1,)),
    (0, (-1, -4), (1, 1)),
    (0, (2, 2), (1,)),
    (0, (2, 3), (1, 1, 1)),
    (0, (2,), (2**62,)),
    (0, (3,), (2**63 - 1,)),
    (2**63, (1,), (1,)),
    (2**63 - 1, (1,), (1,)),
    (2**200, (0,), (1,)),
    (0, (2**40,), (0,)),
    (0, (2**32, 2**32), (0, 0)),
    (0, (2**62, 2**62, 0), (1, 1, 1)),
    (0, (True,), (1,)),
    (0, (1.0,), (1,)),
    (0.0, (1,), (1,)),
    (0, [4], [1]),
    (0, "4", "1"),
    (0, None, None),
    (0, (1,) * 65, (1,) * 65),
]


@pytest.mark.parametrize(("offset", "size", "stride"), HOSTILE_VIEWS)
def test_views_beyond_their_storage_are_refused(write, little_memory, offset, size, stride):
    program = PROTO2 + tensor(offset=offset, size=size, stride=stride) + b"."
    assert type(outcome(write(program, storages={"0": bytes(16)}))) is InputError


N = 20_000
DEEP = {
    "tuples": b")" + b"\x85" * 10 * N,  # hashing this one crashes Python
    "pairs of one value": b"N" + b"2\x86" * 64,  # hashing or printing this one takes years
    "lists": b"]" * N + b"a" * (N - 1),
    "dicts": b"}N" * N + b"N" + b"s" * N,
    "calls": name("a", "B") + b")R" * N,
    "arguments": (name("a", "B") + b"(") * N + b"tR" * N,
    "states": (name("a", "B") + b")R") * N + b"b" * (N - 1),
    "frozen sets": b"(" * N + b"\x91" * N,
    "tensor subclasses": name("torch._tensor", "_rebuild_from_type_v2")
    + b"q\x000"
    + b"h\x00(h\x00N" * N
    + b"("
    + b"tNtR" * N,
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("place", ["value", "key"])
def test_deep_values_neither_crash_nor_hang(write, kind, place):
    program = DEEP[kind] if place == "value" else b"}" + DEEP[kind] + b"Ns"
    path = write(PROTO4 + program + b".")
    value = outcome(path)
    assert type(value) in (InputError, tuple, list, dict, StandIn)
    with pytest.raises(InputError):
        read_tensors(path)


def test_keys_made_to_collide_do_not_hang(write):
    """40,000 numbers with hash 0: as dict keys they would take 800 million comparisons."""
    keys = [i * (2**61 - 1) for i in range(1, 40_001)]
    start = time.monotonic()
    found = read_checkpoint(write(PROTO2 + b"}(" + b"N".join(map(dump, keys)) + b"Nu."))
    assert len(found) == 40_000 and time.monotonic() - start < 5
    assert [key.args for key in found] == [(key,) for key in keys]


def test_cycles_are_read_and_walked(write):
    # d = {"state_dict": d, "self": a stand-in whose state, items and arguments are d}
    stand_in = name("a", "B") + b"(h\x00tR" + dump("d") + b"h\x00s" + b"h\x00b"
    program = b"}q\x00" + dump("state_dict") + b"h\x00s" + dump("self") + stand_in + b"s."
    path = write(PROTO2 + program)
    value = read_checkpoint(path)
    assert value["state_dict"] is value and value["self"].state is value
    assert entries(value["self"])["d"] is value
    with pytest.raises(InputError, match="no named tensors"):
        read_tensors(path)


# Files around the pickle.


def test_the_folder_inside_the_zip_may_have_any_name(tmp_path):
    for prefix in ("", "a/", "a/b/", "archive with \u00e9/"):
        path = write_zip(tmp_path / "a.ckpt", PROTO2 + tensor() + b".", {"0": bytes(16)}, prefix)
        assert read_checkpoint(path).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_repacked_zips_are_read(tmp_path, kind):
    """Python's zipfile aligns nothing, and may compress."""
    torch.save(NORMAL, tmp_path / "a.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "a.ckpt") as old,
        zipfile.ZipFile(tmp_path / "b.ckpt", "w", kind) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    expected, found = (read_checkpoint(tmp_path / name) for name in ("a.ckpt", "b.ckpt"))
    assert [key for key in expected if not same(expected[key], found[key])] == []
    assert all(value.data_ptr() % value.element_size() == 0 for value in found.values())


GOOD = PROTO2 + tensor() + b"."


def zip_with(path, program=GOOD, storages=(("0", bytes(16)),), **more):
    return write_zip(path, program, dict(storages), **more)


def encrypted(path):
    content = bytearray(zip_with(path).read_bytes())
    for start, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for i in range(len(content)):
            if content[i : i + 4] == start:
                content[i + at] |= 1
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(zip_with(path).read_bytes()[:-40])


def moved_entries(path):
    content = zip_with(path).read_bytes()
    at = content.index(b"PK\x01\x02") + 42
    path.write_bytes(content[:at] + struct.pack("<I", 7) + content[at + 4 :])


def oversized_entry(path):
    content = bytearray(zip_with(path).read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 2**20, 2**20)
    path.write_bytes(content)


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


BAD_FILES = {
    "TorchScript": (lambda path: zip_with(path, **{"constants.pkl": b"N."}), "TorchScript"),
    "no pickle": (lambda path: write_zip(path, b"", prefix="x/no_"), "0 data.pkl"),
    "two pickles": (lambda path: zip_with(path, **{"b/data.pkl": b"N."}), "2 data.pkl"),
    "big-endian": (lambda path: zip_with(path, byteorder=b"big"), "b'big'"),
    "encrypted": (encrypted, "encrypted"),
    "bzip2": (lambda path: zip_with(path, kind=zipfile.ZIP_BZIP2), "unusual compression"),
    "pickle bomb": (
        lambda path: zip_with(path, b"N" * 2**25, kind=zipfile.ZIP_DEFLATED),
        "zip bomb: its data.pkl",
    ),
    "storage bomb": (
        lambda path: zip_with(path, storages=[("0", bytes(2**25))], kind=zipfile.ZIP_DEFLATED),
        "33554432 bytes instead of 4 values",
    ),
    "storage cut": (lambda path: zip_with(path, storages=[("0", bytes(12))]), "12 bytes"),
    "storage missing": (lambda path: zip_with(path, storages=[]), "archive/data/0"),
    "cut short": (cut_short, "cut short"),
    "moved entries": (moved_entries, "damaged"),
    "oversized entry": (oversized_entry, "damaged"),
    "tar": (tar, "tar archive"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "pickle that"),
    "random bytes": (lambda path: path.write_bytes(bytes(range(255, 0, -1))), "not a torch"),
    "legacy, more values": (
        lambda path: write_legacy(path, PROTO2 + tensor() + b".", {"0": bytes(20)}),
        "given differently",
    ),
    "legacy, no values": (lambda path: write_legacy(path, PROTO2 + tensor() + b"."), "lacks 1"),
    "legacy, cut short": (
        lambda path: path.write_bytes(
            write_legacy(path, PROTO2 + tensor() + b".", {"0": bytes(16)}).read_bytes()[:-1]
        ),
        "cut short",
    ),
    "legacy, deep key": (
        lambda path: path.write_bytes(
            b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, {}))
            + PROTO2
            + b"N."
            + PROTO2
            + b"])"
            + b"\x85" * N
            + b"a."
        ),
        "damaged",
    ),
    "legacy, two sizes": (
        lambda path: write_legacy(
            path, PROTO2 + storage() + storage(numel=3) + b".", {"0": bytes(16)}
        ),
        "two sizes",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path, little_memory, kind):
    make, expected = BAD_FILES[kind]
    make(tmp_path / "a.ckpt")
    error = outcome(tmp_path / "a.ckpt")
    assert type(error) is InputError and expected in str(error)


def test_many_entries_of_the_same_bytes_may_not_outgrow_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "INFLATED_FREE", 0)
    program = b"".join(storage(key=str(i), numel=2**14) + b"0" for i in range(99)) + b"N."
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("a/data.pkl", PROTO2 + program)
        archive.writestr("a/data/0", bytes(2**16))
        for i in range(1, 99):  # names in the directory only, all for the bytes of the first
            entry = copy.copy(archive.filelist[1])
            entry.filename = f"a/data/{i}"
            archive.filelist.append(entry)
    with pytest.raises(InputError, match="zip bomb"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_compressed_entries_may_not_outgrow_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "INFLATED_FREE", 2**16)
    program = PROTO2 + storage(numel=2**18) + b"."
    path = write_zip(tmp_path / "a.ckpt", program, {"0": bytes(2**20)}, kind=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="zip bomb"):
        read_checkpoint(path)


@pytest.mark.parametrize("instruction", [b"\x8f", b"}\x94", b"]2", b"K\x01\x85"])
@pytest.mark.parametrize("kind", ["deflated", "legacy"])
def test_a_pickle_may_not_have_many_times_the_instructions_of_a_model(
    tmp_path, little_memory, monkeypatch, kind, instruction
):
    monkeypatch.setattr(unpickle, "FREE_INSTRUCTIONS", 2**14)
    program = PROTO4 + instruction * 2**19 + b"."
    if kind == "deflated":
        path = write_zip(tmp_path / "a.ckpt", program, {}, kind=zipfile.ZIP_DEFLATED)
    else:
        path = write_legacy(tmp_path / "a.ckpt", program)
    with pytest.raises(InputError, match="pickle bomb"):
        read_checkpoint(path)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_give_input_errors_only(save, tmp_path, little_memory, seed):
    random_ = random.Random(seed)
    content = save({"state_dict": {"a": torch.ones(3), "b": torch.zeros(2).half()}, "n": 1})
    content = content.read_bytes()
    path, kinds = tmp_path / "damaged.ckpt", collections.Counter()
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(random_.choice([1, 1, 2, 8])):
            damaged[random_.randrange(len(damaged))] = random_.randrange(256)
        if random_.random() < 0.3:
            del damaged[random_.randrange(len(damaged)) :]
        path.write_bytes(damaged or b"\0")
        kinds[type(outcome(path)).__name__] += 1
    assert kinds["InputError"] > 20


# Memory.


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages in /proc")
def test_only_tensors_in_use_take_memory(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({str(i): torch.full((2**21,), float(i)) for i in range(16)}, path)  # 128 MiB
    gc.collect()
    before = resident_mib()
    found = read_checkpoint(path)
    assert resident_mib() - before < 16
    assert found["3"].sum() == 3 * 2**21
    assert resident_mib() - before < 32


def test_tensors_outlive_their_file_and_never_change_it(save):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save({"a": torch.arange(4.0)})
        content = path.read_bytes()
        found = read_checkpoint(path)["a"]
        found.add_(1)
        assert path.read_bytes() == content
        path.unlink()
        gc.collect()
        assert found.tolist() == [1, 2, 3, 4]
