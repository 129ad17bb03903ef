"""Run a checkpoint's pickle without running its code (layer 0, torch only).

A pickle is a program: it imports any name and calls it. Here it runs on a machine that imports
nothing and has nothing real to call. A name becomes a `Global`, two strings; calling one gives a
`StandIn`, an inert record that takes any items and state the program gives it. A dozen
names (`REBUILD`) are answered by functions of this file, which make tensors as bounds-checked views
of bytes that the caller finds. So trainer objects load without their packages, and a hostile
program can only build inert records, or be refused.
"""

import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_DIMS = 64
# A tensor takes 50 instructions; an instruction can take 200 bytes of memory.
FREE_INSTRUCTIONS, BYTES_PER_INSTRUCTION, MAX_INSTRUCTIONS = 2**19, 16, 2**24
EXPANDED_NUMEL = 2**20  # values of a stride-0 view that has fewer behind it

STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}

# Instructions that only move the stack or make numbers, strings, tuples, lists and `Global`s.
PLAIN_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    SHORT_BINBYTES BINBYTES BINBYTES8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3
    LIST EMPTY_LIST EMPTY_DICT GLOBAL STACK_GLOBAL BINPERSID
"""

# What damaged bytes make the standard library and torch raise (RecursionError: a RuntimeError).
MALFORMED = (pickle.PickleError, zipfile.BadZipFile, zlib.error, struct.error, EOFError)
MALFORMED += (LookupError, ValueError, TypeError, AttributeError, ArithmeticError)
MALFORMED += (RuntimeError, MemoryError)


class Refused(Exception):
    """The file asks for something that this reader does not do; the message says what."""


@dataclass(frozen=True)
class Global:
    """The name of a class or function in a pickle; nothing is imported for it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class StandIn(dict):
    """What calling a `Global` gives: an inert record, compared and hashed by identity.

    Its items are those that the pickle sets, `appended` the values that it appends or adds, `args`
    what the call was given, and `state` what `__setstate__` would have been given.
    """

    __slots__ = ("appended", "args", "made_by", "state")
    __hash__, __eq__, __ne__ = object.__hash__, object.__eq__, object.__ne__

    def __init__(self, made_by: object, args: object = ()) -> None:
        super().__init__()
        self.made_by, self.args, self.state, self.appended = made_by, args, None, []

    def __repr__(self) -> str:
        return f"<stand-in for {self.made_by if type(self.made_by) is Global else 'an object'}>"


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes (1-D uint8) behind tensors, and the dtype that the checkpoint gives them."""

    data: Tensor
    dtype: torch.dtype


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    dtype = storage.dtype if type(storage) is Storage else None
    return _tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, metadata)


def _tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    """A tensor over the bytes of a storage. Every argument comes from the pickle: trust none."""
    if type(storage) is not Storage or not isinstance(dtype, torch.dtype):
        raise Refused("its pickle makes a tensor from something that is not a storage")
    if not (type(size) is type(stride) is tuple and len(size) == len(stride) <= MAX_DIMS):
        raise Refused("it holds a tensor whose shape and strides do not belong together")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise Refused("it holds a tensor with an impossible offset, size or stride")
    whole, numel = storage.data.numel() // dtype.itemsize, math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (numel and last >= whole) or numel > max(whole, EXPANDED_NUMEL):
        layout = f"shape {size}, strides {stride}, offset {offset}"
        raise Refused(f"it holds a tensor that overruns its storage of {whole} values: {layout}")
    if numel == 0:
        return torch.empty(size, dtype=dtype)
    values = storage.data[: whole * dtype.itemsize].view(dtype)
    values = values.as_strided(size, stride, values.storage_offset() + offset)
    flags = metadata if type(metadata) is dict else {}
    values = values.conj() if flags.get("conj") else values  # lazy, as the bytes may come later
    return torch._neg_view(values) if flags.get("neg") else values


def _first(value, *_):
    return value


def _subclass(rebuild, kind, args, state):
    return _call(rebuild, args)


def _ordered_dict(*args):
    return StandIn(Global("collections", "OrderedDict"), args) if args else {}


REBUILD: dict[object, Callable] = {
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("torch", "Size"): _first,
    Global("torch.nn.parameter", "Parameter"): _first,
    Global("torch._utils", "_rebuild_parameter"): _first,
    Global("torch._utils", "_rebuild_parameter_with_state"): _first,
    Global("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _first,
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    Global("torch._tensor", "_rebuild_from_type"): _subclass,
    Global("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    Global("torch.tensor", "_rebuild_from_type"): _subclass,
}


def _call(function: object, args: object) -> object:
    """Answer a call: by a function of `REBUILD`, or by a stand-in that records it."""
    if type(function) not in (Global, StandIn):
        raise Refused(f"its pickle calls a value of type {type(function).__name__}")
    rebuild = REBUILD.get(function)
    return rebuild(*args) if rebuild and type(args) is tuple else StandIn(function, args)


def _as_key(key: object) -> object:
    """A key that is safe to hash: others become stand-ins.

    Hashing a deep tuple crashes Python, and tuples and huge numbers can be made to collide.
    """
    if type(key) in (str, bytes, bool, float, type(None), Global, StandIn):
        return key
    if type(key) is int and abs(key) < 2**60:
        return key
    return StandIn(Global("builtins", type(key).__name__), (key,))


def _set_items(target: object, items: list) -> None:
    if not isinstance(target, dict):
        raise Refused(f"its pickle sets items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_as_key(key)] = value


def _add_values(target: object, values: list) -> None:
    if type(target) not in (list, StandIn):
        raise Refused(f"its pickle appends to a {type(target).__name__}")
    (target.appended if type(target) is StandIn else target).extend(values)


class _Counted(dict):
    """The instructions of the machine, of which `room` are carried out."""

    room = 0

    def __getitem__(self, code: int) -> Callable:
        self.room -= 1
        if self.room < 0:
            raise Refused("a pickle bomb: it has far more instructions than its tensors need")
        return super().__getitem__(code)


class _Machine(pickle._Unpickler):
    """The pickle machine; every instruction that touches an object is replaced.

    It builds on the Python class of the standard library, private but stable since Python 3.0: the
    C class cannot change single instructions, and allocates what a hostile memo index asks for.
    It reads a mapping or BytesIO: unlike a file's, their reads allocate no more than there is.
    """

    def __init__(self, stream: mmap.mmap | io.BytesIO, find_storage: Callable | None, room: int):
        super().__init__(stream, encoding="utf-8", errors="surrogateescape")
        self.find_storage = find_storage
        self.dispatch = _Counted(self.dispatch)
        self.dispatch.room = room

    def find_class(self, module: str, name: str) -> Global | torch.dtype:
        value = vars(torch).get(name) if module == "torch" else None
        return value if isinstance(value, torch.dtype) else Global(module, name)

    def persistent_load(self, pid: object) -> object:
        """Resolve ("storage", type, key, device, count, view) or ("module", class, file, source)"""
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        if not (type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage"):
            raise Refused("its pickle refers to something outside itself that is not a storage")
        _, kind, key, _, numel, *view = pid
        if not (type(kind) is Global and type(key) is str and type(numel) is int and numel >= 0):
            raise Refused("its pickle describes a storage as torch.save does not")
        if kind.module not in STORAGE_MODULES or kind.name not in STORAGE_DTYPES:
            raise Refused(f"it holds a {str(kind)!r:.80}, which is not read here")
        dtype = STORAGE_DTYPES[kind.name]
        data = self.find_storage(key, dtype, numel)
        if view and view[0] is not None:
            _, offset, count = view[0]
            if not (type(offset) is type(count) is int and 0 <= offset <= offset + count <= numel):
                raise Refused(f"it holds a view that overruns its storage {key!r:.80}")
            data = data[offset * dtype.itemsize : (offset + count) * dtype.itemsize]
        return Storage(data, dtype)

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(_call(function, args))

    load_newobj = load_reduce  # a class and its arguments: a stand-in is made the same way

    def load_newobj_ex(self) -> None:
        keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(_call(function, (args, keywords)))

    def load_obj(self) -> None:
        function, *args = self.pop_mark()
        self.append(_call(function, tuple(args)))

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode() for _ in range(2))
        args = tuple(self.pop_mark())
        self.append(_call(self.find_class(module, name), args))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is StandIn:
            target.state = state
        elif not isinstance(target, (dict, Tensor)):  # theirs is dropped: hooks, version numbers
            raise Refused(f"its pickle sets attributes of a {type(target).__name__}")

    def load_append(self) -> None:
        value = self.stack.pop()
        _add_values(self.stack[-1], [value])

    def load_appends(self) -> None:
        values = self.pop_mark()
        _add_values(self.stack[-1], values)

    load_additems = load_appends

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def load_dict(self) -> None:
        items, made = self.pop_mark(), {}
        _set_items(made, items)
        self.append(made)

    def load_empty_set(self) -> None:  # sets are stand-ins, so that their members need no hash
        self.append(StandIn(Global("builtins", "set")))

    def load_frozenset(self) -> None:
        values = self.pop_mark()
        self.append(StandIn(Global("builtins", "frozenset"), (values,)))

    def load_bytearray8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(count))

    def refuse(self) -> None:
        raise Refused("its pickle holds an instruction that torch.save does not write")

    dispatch = dict.fromkeys(range(256), refuse)
    dispatch |= {
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in map(vars(pickle).get, PLAIN_INSTRUCTIONS.split())
    }


_Machine.dispatch |= {
    code: getattr(_Machine, load.__name__)
    for code, load in pickle._Unpickler.dispatch.items()
    if load.__name__ in vars(_Machine)
}


def _is_named(pair: object) -> bool:
    return type(pair) in (tuple, list) and len(pair) == 2 and type(pair[0]) is str


def entries(value: object) -> dict[str, object]:
    """Return what a dict or a stand-in holds by name; {} for anything else.

    A stand-in's names come from its items, its state, and the dicts and lists of pairs among its
    arguments: Python 2's OrderedDict and dict subclasses of pickle protocol 0 have items there.
    """
    sources = [value]
    if type(value) is StandIn:
        for held in (value.state, value.args):
            sources += held if type(held) is tuple else [held]
    named: dict[str, object] = {}
    for source in reversed(sources):
        pairs = source.items() if isinstance(source, dict) else source
        if isinstance(source, (dict, list)):
            named |= [pair for pair in pairs if _is_named(pair)]
    return named


def unpickle(
    stream: mmap.mmap | io.BytesIO,
    find_storage: Callable[[str, torch.dtype, int], Tensor] | None = None,
    *,
    file_size: int,
) -> object:
    """Return the object that a pickle describes, with nothing of it executed.

    Lists, tuples and dicts are plain (an OrderedDict too); tensors and parameters are plain CPU
    tensors without gradient, and tied ones share memory; all else is a `Global`, `StandIn` or
    `Storage`, and so are keys that are not text or numbers. The graph may be cyclic, and of
    any depth: do not recurse into it.

    Args:
        stream: read up to the end of the pickle. Its reads must not allocate more than it holds.
        find_storage: (key, dtype, number of values) -> their bytes, 1-D uint8.
        file_size: bytes of the whole checkpoint; limits how many instructions are carried out.
    Raises: Refused, or one of `MALFORMED`; the caller knows the file's name.
    """
    room = min(FREE_INSTRUCTIONS + file_size // BYTES_PER_INSTRUCTION, MAX_INSTRUCTIONS)
    return _Machine(stream, find_storage, room).load()
