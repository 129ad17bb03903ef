"""What is trained: the U-Net of an edit model, or an autoencoder (layer 4).

A learner owns the networks of a run. The loop asks it for the loss of each sample, for a validation
and for the weights to save, and knows nothing else about it.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ipx2p.data.loader import Batch
from ipx2p.data.pairs import EditPair
from ipx2p.diffusion.objective import draw, drop_conditions, loss_per_sample
from ipx2p.diffusion.schedule import Schedule, ScheduleConfig
from ipx2p.editor import Editor
from ipx2p.errors import InputError
from ipx2p.images import pixels_from_pixels01
from ipx2p.models.text import TextEncoder
from ipx2p.models.unet import LATENT_CHANNELS, UNet
from ipx2p.models.vae import VAE
from ipx2p.seeds import generator, unit_noise
from ipx2p.training.config import TrainConfig
from ipx2p.training.validation import EditValidation, Report, validate_autoencoder
from ipx2p.weights.convert import widen
from ipx2p.weights.folder import Weights
from ipx2p.weights.readers import find_folder

Network = TypeVar("Network", bound=nn.Module)


class Learner(Protocol):
    """What the loop knows of a model in training."""

    module: nn.Module  # what is optimized
    part: str  # its folder in a weights folder

    def losses(self, batch: Batch) -> Tensor:
        """Loss of each sample, float32, (B,)."""

    def validate(self, module: nn.Module) -> Report:
        """Measure `module`, the trained one or its average, on the held-out pairs."""

    def weights(self, module: nn.Module) -> Weights:
        """All parts of the model with `module` in its place, to be saved."""


class EditLearner:
    """The U-Net of an edit model; autoencoder and text encoder stay as they are.

    Raises: InputError for weights or settings that do not go together.
    """

    part = "unet"

    def __init__(
        self, config: TrainConfig, device: torch.device, held_out: Sequence[EditPair]
    ) -> None:
        self.config = config
        self.device = device
        folder = find_folder(config.model.weights)
        schedule = _read_schedule(folder)
        if config.objective.prediction_type is not None:
            schedule = replace(schedule, prediction_type=config.objective.prediction_type)
        if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
            raise InputError(
                "zero-terminal SNR cannot be trained with epsilon prediction: set "
                "objective.prediction_type to v_prediction"
            )
        self.schedule = Schedule(schedule)
        self.vae = _frozen(VAE.load(folder / "vae"), device)
        self.text = _frozen(TextEncoder.load(folder), device)
        _check_resolution(config, self.vae)
        edit = config.validation.edit
        self.schedule.plan(edit.sampler, edit.spacing, edit.num_steps)

        self.module = self._unet(folder).to(device).train()
        self.editor(self.module)  # refuses parts that do not fit together
        self.null_text = self.text.encode([""])
        self.validation = EditValidation(held_out, self.vae, config.validation, config.run.seed)

    def losses(self, batch: Batch) -> Tensor:
        """See `Learner.losses`."""
        source_pixels, target_pixels = (
            pixels.to(self.device, non_blocking=True)
            for pixels in (batch.source_pixels, batch.target_pixels)
        )
        with torch.no_grad():
            target = self.vae.encode(target_pixels)
            source_latents = self.vae.encode(source_pixels).mode()
        draws = draw(
            self.config.run.seed,
            batch.indices,
            target.mean.shape[1:],
            self.schedule.config.num_train_timesteps,
        ).to(self.device)
        latents = self.vae.scale(target.sample(noise=draws.posterior_noise))
        text, source_latents = drop_conditions(
            self._text(batch.instructions),
            source_latents,
            self.null_text,
            draws.dropout,
            self.config.objective.dropout,
        )
        noisy = self.schedule.add_noise(latents, draws.noise, draws.timesteps)
        prediction = self.module(noisy, draws.timesteps.float(), text, source_latents)
        target = self.schedule.target(latents, draws.noise, draws.timesteps)
        return loss_per_sample(prediction, target)

    def validate(self, module: nn.Module) -> Report:
        """See `Learner.validate`."""
        return self.validation(self.editor(module))

    def weights(self, module: nn.Module) -> Weights:
        """See `Learner.weights`."""
        return Weights(module, self.vae, self.text, self.schedule.config)

    def editor(self, module: nn.Module) -> Editor:
        """The model with `module` as its U-Net, ready to edit."""
        return Editor(module, self.vae, self.text, self.schedule)

    def _text(self, instructions: Sequence[str]) -> Tensor:
        """States of the instructions, (B, 77, D); each different one is encoded once."""
        distinct = [*dict.fromkeys(instructions)]
        rows = [distinct.index(instruction) for instruction in instructions]
        return self.text.encode(distinct)[rows]

    def _unet(self, folder: Path) -> UNet:
        sizes = self.config.model.unet
        if sizes is not None:
            return _fresh(lambda: UNet(sizes), self.config.run.seed)
        unet = UNet.load(folder / "unet")
        channels = unet.config.in_channels
        start = "widened to 8" if channels == LATENT_CHANNELS else "taken as they are"
        print(f"U-Net from {folder}, {channels} input channels, {start}")
        return widen(unet)


class AutoencoderLearner:
    """The autoencoder, from scratch or tuned: pixel loss and a little of the posterior's KL."""

    part = "vae"

    def __init__(
        self, config: TrainConfig, device: torch.device, held_out: Sequence[EditPair]
    ) -> None:
        self.config = config
        self.device = device
        self.held_out = held_out
        folder = find_folder(config.model.weights)
        self.schedule = _read_schedule(folder)
        self.text = TextEncoder.load(folder, dtype=None)
        sizes = config.model.vae
        if sizes is None:
            vae = VAE.load(folder / "vae")
        else:
            vae = _fresh(lambda: VAE(sizes), config.run.seed)
        _check_resolution(config, vae)
        self.module = vae.to(device).train()

    def losses(self, batch: Batch) -> Tensor:
        """See `Learner.losses`. L1 and L2 on pixels, KL per latent value."""
        pixels = batch.target_pixels.to(self.device, non_blocking=True)
        side = self.config.data.resolution // self.module.config.downscale
        shape = (LATENT_CHANNELS, side, side)
        seed = self.config.run.seed
        noise = torch.stack([unit_noise(shape, seed, "objective", i) for i in batch.indices])
        decoded, posterior = self.module(pixels, noise)
        difference = decoded.float() - pixels
        pixel_loss = (difference.abs() + difference.square()).flatten(1).mean(1)
        return pixel_loss + self.config.objective.kl_weight * posterior.kl() / noise[0].numel()

    def validate(self, module: nn.Module) -> Report:
        """See `Learner.validate`."""
        return validate_autoencoder(module, self.held_out)

    @torch.no_grad()
    def weights(self, module: nn.Module) -> Weights:
        """See `Learner.weights`. A fresh one is saved with the scale that its latents need."""
        if self.config.model.vae is not None:
            targets = torch.stack([pair.target_pixels01 for pair in self.held_out])
            pixels = pixels_from_pixels01(targets).to(self.device)
            scale = round(1 / module.encode(pixels).mean.std().item(), 5)  # to unit variance
            module = copy.copy(module)
            module.config = replace(module.config, scaling_factor=scale)
        return Weights(None, module, self.text, self.schedule)


LEARNERS: dict[str, type] = {"edit": EditLearner, "autoencoder": AutoencoderLearner}


def _read_schedule(folder: Path) -> ScheduleConfig:
    return ScheduleConfig.read(folder / "scheduler" / "scheduler_config.json")


def _check_resolution(config: TrainConfig, vae: VAE) -> None:
    resolution, multiple = config.data.resolution, vae.config.downscale
    if resolution % multiple:
        above = -(-resolution // multiple) * multiple
        raise InputError(
            f"data.resolution is {resolution}, expected a multiple of the autoencoder's {multiple} "
            f"such as {above}"
        )


def _frozen(module: Network, device: torch.device) -> Network:
    return module.to(device).eval().requires_grad_(False)


def _fresh(build: Callable[[], Network], seed: int) -> Network:
    """A network with weights drawn from the run's seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU
        torch.manual_seed(generator(seed, "weights").initial_seed())
        network = build()
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"fresh {type(network).__name__}, {num_parameters / 1e6:.1f} M parameters")
    return network
