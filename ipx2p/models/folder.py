"""A network's published folder, `config.json` and weights: the same for U-Net and VAE (layer 1)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ipx2p.tensor_files.tensors import find_weights, load_strict, read_tensors, save_tensors

STEM = "diffusion_pytorch_model"
CONFIG = "config.json"

Network = TypeVar("Network", bound=nn.Module)


class NetworkConfig(Protocol):
    """Sizes of a network that can be read from and written to a `config.json`."""

    def write(self, path: Path) -> None: ...


def load_network(
    build: Callable[[], Network],
    folder: Path,
    dtype: torch.dtype | None,
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> Network:
    """Build a network without values and give it those of its folder; on the CPU, for inference.

    Args:
        dtype: of the weights; None keeps what the file has.
        rename: brings the file's tensors under the network's names.
    Raises: InputError for a missing or damaged file, or tensors that do not fit.
    """
    with torch.device("meta"):
        network = build()
    path = find_weights(folder, (STEM,))
    load_strict(network, rename(read_tensors(path)), str(path))
    return network.to(dtype=dtype).eval()


def save_network(network: nn.Module, config: NetworkConfig, folder: Path) -> None:
    """Write `config.json` and the weights in their own dtype, as diffusers reads them."""
    config.write(folder / CONFIG)
    save_tensors(network.state_dict(), folder / f"{STEM}.safetensors")
