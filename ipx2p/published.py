"""Networks and schedules as published: a `config.json`, and weights beside it (layer 0).

A published config is data from someone else. Nothing in it is interpolated or run. Values must have
the type of their field and lie within its bounds, so that a hostile file can neither read the
environment nor ask for a network that fills the memory.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ipx2p.errors import InputError
from ipx2p.files import read_json, write_json
from ipx2p.published_fields import LAYOUTS, check_bounds, typed_fields
from ipx2p.tensor_files import tensors as tensor_files

CONFIG = "config.json"

Config = TypeVar("Config", bound="PublishedConfig")
Network = TypeVar("Network", bound="PublishedNetwork")


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
        config = cls(**typed_fields(cls, raw, where))
        config.check(where)
        derived = layout.derived(asdict(config))
        supported = layout.supported | derived
        known = layout.harmless | asdict(config).keys()
        for name, value in raw.items():
            is_note = name.startswith("_") or (value is None and name in derived)
            if name in known or is_note:
                continue
            found = f"{where}: {name if name.isidentifier() else repr(name)} is {value!r:.200}"
            if name in supported and value != supported[name]:
                raise InputError(f"{found}, only {supported[name]!r} is supported")
            if name not in supported and value is not None and value is not False:
                raise InputError(f"{found}, a field that is not known here and cannot be honoured")
        config.others = {n: v for n, v in raw.items() if n in layout.harmless | {"_class_name"}}
        return config

    def write(self, path: Path) -> None:
        """Write the file that diffusers reads."""
        layout, sizes = LAYOUTS[self.class_name], asdict(self)
        published = {**self.others, **layout.pack(sizes), **layout.derived(sizes)}
        write_json({"_class_name": self.class_name, **published}, path)

    def check(self, where: str) -> None:
        """Raise InputError for sizes that cannot be, naming the field."""
        sizes = {name: value for name, value in asdict(self).items() if value is not None}
        check_bounds(sizes, LAYOUTS[self.class_name].bounds, where)
        groups = sizes.get("norm_num_groups", 1)
        fits = not any(width % groups for width in sizes.get("block_out_channels", []))
        self.expect(where, "block_out_channels", fits, f"multiples of norm_num_groups {groups}")

    def expect(self, where: str, name: str, is_so: bool, expected: str) -> None:
        """Raise the InputError that names the field unless it is as expected."""
        if not is_so:
            found = f"{name} is {getattr(self, name)!r:.200}"
            raise InputError(f"{where}: {found}, expected {expected}")


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
        path = tensor_files.find_weights(Path(folder))
        tensor_files.load_strict(network, cls.renamed(tensor_files.read_tensors(path)), str(path))
        return network.to(dtype=dtype).eval()

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and the weights in their own dtype, as diffusers reads them."""
        self.config.write(Path(folder) / CONFIG)
        path = Path(folder) / f"{tensor_files.NETWORK_STEMS[0]}.safetensors"
        tensor_files.save_tensors(self.state_dict(), path)

    @staticmethod
    def renamed(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a file under the network's own names."""
        return tensors
