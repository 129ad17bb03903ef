"""Networks and schedules as published: a `config.json`, and weights beside it (layer 0).

A published config is data that someone else wrote. Nothing in it is interpolated or run; a value
must have the type of its field and lie within the bounds declared for it, so that a hostile
file can neither read the environment nor ask for a network that fills the memory.
"""

import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ipx2p.errors import InputError
from ipx2p.files import read_json, write_json
from ipx2p.published_fields import LAYOUTS, Bounds
from ipx2p.tensor_files.tensors import (
    NETWORK_STEMS,
    find_weights,
    load_strict,
    read_tensors,
    save_tensors,
)

CONFIG = "config.json"
MAX_ENTRIES = 10  # of a list in a config: levels of a network

Config = TypeVar("Config", bound="PublishedConfig")
Network = TypeVar("Network", bound="PublishedNetwork")


def check_bounds(values: Mapping[str, Any], bounds: Bounds, where: str) -> None:
    """Raise InputError for the first value, or list of values, that is out of its bounds."""
    for name, (low, high) in bounds.items():
        value = values.get(name, low)
        many = value if isinstance(value, list) else [value]
        if not all(_is_a(one, float) and low <= one <= high for one in many):
            raise InputError(f"{where}: {name} is {value!r:.200}, expected {low} to {high}")
        if not 1 <= len(many) <= MAX_ENTRIES:
            raise InputError(
                f"{where}: {name} has {len(many)} entries, expected 1 to {MAX_ENTRIES}"
            )


@dataclass
class PublishedConfig:
    """Sizes that are read from and written to a published file, see `published_fields.py`."""

    class_name: ClassVar[str]  # what the file calls what it describes
    others: ClassVar[Mapping[str, Any]] = {}  # fields of the file that only matter elsewhere

    @classmethod
    def read(cls: type[Config], path: Path) -> Config:
        """Read a published file; InputError names a field that cannot be honoured."""
        where, layout = str(path), LAYOUTS[cls.class_name]
        raw = layout.unpack(layout.defaults | read_json(path))
        config = cls(**_fields(cls, raw, where))
        config.check(where)
        supported = {**layout.supported, **layout.derived(asdict(config))}
        known = layout.harmless | asdict(config).keys()
        for name, value in raw.items():
            shown = name if name.isidentifier() else repr(name)
            if name in known or name.startswith("_"):  # those are notes
                continue
            if name in supported and value != supported[name]:
                expected = f"only {supported[name]!r} is supported"
                raise InputError(f"{where}: {shown} is {value!r:.200}, {expected}")
            if name not in supported and value is not None and value is not False:
                found = f"{shown} = {value!r:.200}"
                raise InputError(f"{where}: {found} is not known here and cannot be honoured")
        config.others = {n: v for n, v in raw.items() if n in layout.harmless | {"_class_name"}}
        return config

    def write(self, path: Path) -> None:
        """Write the file that diffusers reads."""
        layout, sizes = LAYOUTS[self.class_name], asdict(self)
        published = {**self.others, **layout.pack(sizes), **layout.derived(sizes)}
        write_json({"_class_name": self.class_name, **published}, path)

    def check(self, where: str) -> None:
        """Raise InputError for sizes that cannot be, naming the field."""
        check_bounds(asdict(self), LAYOUTS[self.class_name].bounds, where)

    def refuse(self, where: str, name: str, expected: str) -> typing.NoReturn:
        """Raise the InputError that names the field."""
        raise InputError(f"{where}: {name} is {getattr(self, name)!r:.200}, expected {expected}")


class PublishedNetwork(nn.Module):
    """A network whose folder holds `config.json` and weights: the U-Net, the autoencoder."""

    config_type: ClassVar[type[PublishedConfig]]
    config: PublishedConfig

    @classmethod
    def load(
        cls: type[Network], folder: str | Path, dtype: torch.dtype | None = torch.float32
    ) -> Network:
        """A network from its published folder, on the CPU, ready for inference.

        Args:
            dtype: of the weights; None keeps what the file has.
        Raises: InputError for a missing or damaged file, or a config that cannot be honoured.
        """
        with torch.device("meta"):
            network = cls(cls.config_type.read(Path(folder) / CONFIG))
        path = find_weights(Path(folder))
        load_strict(network, cls.renamed(read_tensors(path)), str(path))
        return network.to(dtype=dtype).eval()

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and the weights in their own dtype, as diffusers reads them."""
        self.config.write(Path(folder) / CONFIG)
        save_tensors(self.state_dict(), Path(folder) / f"{NETWORK_STEMS[0]}.safetensors")

    @staticmethod
    def renamed(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a file under the network's own names."""
        return tensors


def _fields(kind: type, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a dataclass that a file holds, each of the type of its field."""
    values = {}
    for one in fields(kind):
        if one.name in raw:
            value = raw[one.name]
            if not _is_a(value, one.type):
                is_plain = one.type in (int, float, bool, str)
                expected = one.type.__name__ if is_plain else one.type
                raise InputError(f"{where}: {one.name} is {value!r:.200}, expected {expected}")
            values[one.name] = float(value) if one.type is float else value
    return values


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is list:
        (entry,) = typing.get_args(kind)
        return isinstance(value, list) and all(_is_a(one, entry) for one in value)
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(kind))
    if kind is float:  # neither infinite nor NaN
        return type(value) in (int, float) and -1e300 < value < 1e300
    return type(value) is kind
