"""What the loop knows about a model in training, and what learners share (layer 4).

A learner owns the networks of a run. The loop asks it for the loss of each sample, for a validation
and for the weights to save, and knows nothing else about it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ipx2p.data.loader import Batch
from ipx2p.data.pairs import EditPair
from ipx2p.diffusion.schedule import ScheduleConfig
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.models.text import TextEncoder
from ipx2p.models.vae import VAE, VAEConfig
from ipx2p.seeds import generator
from ipx2p.training.config import TrainConfig
from ipx2p.training.speed import set_layout
from ipx2p.training.validation import Report
from ipx2p.weights.convert import load_vae
from ipx2p.weights.folder import Weights
from ipx2p.weights.readers import find_folder

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Losses:
    """The losses of a micro-batch of B samples.

    weighted: to be minimized, float32, (B,). plain: the same without weights, detached.
    quartiles: 0..3, of the samples' timesteps, (B,), on the CPU; None without timesteps.
    hidden: how many samples lost a condition, by condition.
    """

    weighted: Tensor
    plain: Tensor
    quartiles: Tensor | None = None
    hidden: dict[str, int] = field(default_factory=dict)


class Learner:
    """What the loop knows about a model in training.

    Raises: InputError for weights or settings that do not go together.
    """

    module: nn.Module  # the one that is optimized
    network: nn.Module  # for the forward pass: the module, or its wrapper for several processes
    part: str  # its folder in a weights folder

    def __init__(
        self, config: TrainConfig, device: torch.device, held_out: Sequence[EditPair], world: World
    ) -> None:
        self.config = config
        self.device = device
        self.held_out = held_out
        self.world = world
        self.folder = find_folder(config.model.weights)
        path = self.folder / "scheduler" / "scheduler_config.json"
        self.noise_schedule = ScheduleConfig.read(path)
        self.build()
        set_layout(self.module, config.train)

    def build(self) -> None:
        """Load or make the networks, and check that they fit the settings."""

    def losses(self, batch: Batch) -> Losses:
        """The losses of a micro-batch."""

    def validate(self, averaged: nn.Module, raw: nn.Module, check: Callable[[], None]) -> Report:
        """Measure the average, and the trained module itself, on the held-out pairs.

        Args:
            check: called now and then; it may raise to abandon the validation.
        """

    def weights(self, module: nn.Module, *, whole: bool) -> Weights:
        """The model with `module` in its place, to be saved; `whole` with the frozen parts."""

    def networks(self) -> list[nn.Module]:
        """All networks that a step uses."""
        return [self.module]

    def flops_per_sample(self) -> float | None:
        """FLOPs of one sample's forward and backward pass through the module; None: not counted."""


class FrozenParts:
    """Frozen autoencoder and text encoder of a weights folder.

    Args:
        vae: another autoencoder, see `pick_vae`.
    """

    def __init__(self, folder: Path, device: torch.device, vae: str | None = None) -> None:
        self.folder = folder
        self.vae = vae
        self.device = device
        self._held: tuple[VAE, TextEncoder] | None = self._load()

    def get(self) -> tuple[VAE, TextEncoder]:
        """Both, on the device; after `release`, loaded again for the caller alone."""
        return self._held or self._load()

    def release(self) -> None:
        """Free their memory."""
        self._held = None

    def _load(self) -> tuple[VAE, TextEncoder]:
        networks = (pick_vae(self.folder, self.vae), TextEncoder.load(self.folder))
        return tuple(module.to(self.device).eval().requires_grad_(False) for module in networks)


def pick_vae(folder: Path, other: str | None) -> VAE:
    """The autoencoder of a weights folder, in float32.

    Args:
        other: the SOURCE of another one in its place, as `load_vae` reads it.
    """
    if other is None:
        return VAE.load(folder / "vae")
    return load_vae(other, VAEConfig.read(folder / "vae" / "config.json")).float().eval()


def check_resolution(config: TrainConfig, vae: VAE) -> None:
    """Raise InputError for sizes of pictures that the autoencoder cannot halve evenly."""
    multiple = vae.config.downscale
    sizes = {"data": config.data.resolution, "validation": config.edit_resolution}
    for group, resolution in sizes.items():
        if resolution % multiple:
            above = -(-resolution // multiple) * multiple
            raise InputError(
                f"{group}.resolution is {resolution}, expected a multiple of the autoencoder's "
                f"{multiple} such as {above}"
            )


def fresh_network(build: Callable[[], Network], seed: int, world: World) -> Network:
    """A network with weights drawn from the run's seed, independent of earlier draws."""
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU
        torch.manual_seed(generator(seed, "weights").initial_seed())
        network = build()
    size = num_parameters(network) / 1e6
    world.print(f"fresh {type(network).__name__}, {size:.1f} M parameters")
    return network


def num_parameters(network: nn.Module) -> int:
    """The number of its parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
