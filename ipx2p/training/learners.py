"""The networks that are trained: the U-Net of an edit model, or an autoencoder (layer 4).

A learner owns the networks of a run. The loop asks it for the loss of each sample, for a validation
and for the weights to save, and knows nothing else about it.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ipx2p.data.cache import EncodedBatch
from ipx2p.data.loader import Batch
from ipx2p.data.pairs import EditPair
from ipx2p.devices import copy_to, pick_dtype
from ipx2p.diffusion.objective import (
    draw,
    drop_conditions,
    hidden_conditions,
    loss_per_sample,
    min_snr_weight,
)
from ipx2p.diffusion.samplers import make_plan
from ipx2p.diffusion.schedule import Schedule, ScheduleConfig
from ipx2p.distributed import World
from ipx2p.editing.editor import Editor
from ipx2p.errors import InputError
from ipx2p.images import pixels_from_pixels01
from ipx2p.models.flops import counted_flops
from ipx2p.models.text import TextEncoder
from ipx2p.models.unet import LATENT_CHANNELS, UNet
from ipx2p.models.vae import VAE, Posterior
from ipx2p.seeds import generator, unit_noise
from ipx2p.training.config import TrainConfig
from ipx2p.training.speed import set_layout
from ipx2p.training.validation import EditValidation, Report, validate_autoencoder
from ipx2p.weights.convert import widen
from ipx2p.weights.folder import Weights
from ipx2p.weights.readers import find_folder

Network = TypeVar("Network", bound=nn.Module)
QUARTILES = 4  # of the timesteps


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
    """Frozen autoencoder and text encoder of a weights folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self._held: tuple[VAE, TextEncoder] | None = self._load()

    def get(self) -> tuple[VAE, TextEncoder]:
        """Both, on the device; after `release`, loaded again for the caller alone."""
        return self._held or self._load()

    def release(self) -> None:
        """Free their memory."""
        self._held = None

    def _load(self) -> tuple[VAE, TextEncoder]:
        networks = (VAE.load(self.folder / "vae"), TextEncoder.load(self.folder))
        return tuple(module.to(self.device).eval().requires_grad_(False) for module in networks)


class EditLearner(Learner):
    """The U-Net of an edit model; autoencoder and text encoder are frozen."""

    part = "unet"

    def build(self) -> None:
        config, device, world = self.config, self.device, self.world
        chosen = {
            "prediction_type": config.objective.prediction_type,
            "rescale_betas_zero_snr": config.objective.zero_terminal_snr,
        }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        schedule = copy.copy(self.noise_schedule)  # with what only other programs read
        vars(schedule).update(chosen)
        if chosen.get("rescale_betas_zero_snr"):  # which needs the trailing spacing
            kept = schedule.others.items()
            schedule.others = {k: v for k, v in kept if k != "timestep_spacing"}
        if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
            raise InputError(
                "zero-terminal SNR cannot be trained with epsilon prediction: set "
                "objective.prediction_type to v_prediction"
            )
        self.schedule = Schedule(schedule)
        self.frozen = FrozenParts(self.folder, device)
        vae, text = self.frozen.get()
        self.vae_config = vae.config
        _check_resolution(config, vae)
        edit = config.validation.edit
        make_plan(self.schedule, edit.sampler, edit.spacing, edit.num_steps)

        self.module = self.network = self._unet().to(device).train()
        self.side = config.data.resolution // vae.config.downscale
        self.module.config = copy.copy(self.module.config)
        self.module.config.sample_size = config.edit_resolution // vae.config.downscale
        self.module.config.check("data.resolution")
        self.precision = pick_dtype(config.train.precision, device)
        self.editor(self.module)  # raises if the parts do not fit together
        self.null_text = text.encode([""])
        seed = config.run.seed
        self.validation = EditValidation(self.held_out, vae, config.validation, seed, world)

    def losses(self, batch: Batch | EncodedBatch) -> Losses:
        objective = self.config.objective
        target, source_latents, text = self._encoded(batch)
        num_timesteps = self.schedule.config.num_train_timesteps
        shape, shift = target.mean.shape[1:], objective.timestep_shift
        draws = draw(self.config.run.seed, batch.indices, shape, num_timesteps, shift)
        hide_text, hide_source = hidden_conditions(draws.dropout, objective.dropout)
        quartiles = draws.timesteps * QUARTILES // num_timesteps
        hidden = {
            "text": int((hide_text & ~hide_source).sum()),  # the instruction alone
            "image": int((hide_source & ~hide_text).sum()),
            "both": int((hide_text & hide_source).sum()),
        }
        draws = draws.to(self.device)
        latents = self.vae_config.scale(target.sample(noise=draws.posterior_noise))
        text, source_latents = drop_conditions(
            text,
            source_latents,
            self.null_text,
            copy_to(hide_text, self.device),
            copy_to(hide_source, self.device),
        )
        noisy = self.schedule.add_noise(latents, draws.noise, draws.timesteps)
        with torch.autocast(
            self.device.type, self.precision, enabled=self.precision != torch.float32
        ):
            prediction = self.network(noisy, draws.timesteps.float(), text, source_latents)
        target = self.schedule.target(latents, draws.noise, draws.timesteps)
        losses = loss_per_sample(prediction, target)
        weighted = losses
        if objective.min_snr_gamma is not None:
            snr = self.schedule.snr(draws.timesteps)
            prediction_type = self.schedule.config.prediction_type
            weighted = losses * min_snr_weight(snr, objective.min_snr_gamma, prediction_type)
        return Losses(weighted, losses.detach(), quartiles, hidden)

    def validate(self, averaged: nn.Module, raw: nn.Module, check: Callable[[], None]) -> Report:
        editor = self.editor(averaged)
        raw_editor = Editor(raw, editor.vae, editor.text, self.schedule)
        scores, sheet = self.validation(editor, raw_editor, check)
        return Report(scores, sheet, self._fixed_losses(editor))

    def weights(self, module: nn.Module, *, whole: bool) -> Weights:
        frozen = self.frozen.get() if whole else (None, None)
        how = asdict(self.config.validation.edit) | {"resolution": self.config.edit_resolution}
        return Weights(module, *frozen, self.schedule.config, how)

    def networks(self) -> list[nn.Module]:
        return [self.module, *self.frozen.get()]

    def flops_per_sample(self) -> float:
        return counted_flops(self.module.config, self.side, self.side, training=True)

    def editor(self, module: nn.Module) -> Editor:
        """The model with `module` as its U-Net, ready to edit."""
        return Editor(module, *self.frozen.get(), self.schedule)

    @torch.no_grad()
    def _fixed_losses(self, editor: Editor) -> dict[str, float]:
        """Loss in the middle of each quartile of the timesteps, with the same noise every time."""
        total = self.schedule.config.num_train_timesteps
        middles = [total * (2 * q + 1) // (2 * QUARTILES) for q in range(QUARTILES)]
        timesteps = torch.tensor(middles, device=self.device)
        losses = []
        for index in self.world.share(range(len(self.held_out))):
            pair = self.held_out[index]
            source, target = (
                editor.vae.encode(pixels_from_pixels01(pixels01)[None].to(self.device)).mode()
                for pixels01 in (pair.source_pixels01, pair.target_pixels01)
            )
            latents = self.vae_config.scale(target).expand(QUARTILES, -1, -1, -1)
            noise = unit_noise(latents.shape, self.config.run.seed, "validation noise", index)
            noise = noise.to(self.device)
            prediction = editor.unet(
                self.schedule.add_noise(latents, noise, timesteps),
                timesteps.float(),
                editor.text.encode([pair.instruction]).expand(QUARTILES, -1, -1),
                source.expand(QUARTILES, -1, -1, -1),
            )
            target = self.schedule.target(latents, noise, timesteps)
            losses.append(loss_per_sample(prediction, target).tolist())
        means = torch.tensor(self.world.merge(losses)).mean(0).tolist()
        return {f"loss_q{quartile}": value for quartile, value in enumerate(means, 1)}

    def _encoded(self, batch: Batch | EncodedBatch) -> tuple[Posterior, Tensor, Tensor]:
        """The targets' posterior, the sources' mode and the sentences' states, (B, 77, D)."""
        if isinstance(batch, EncodedBatch):
            names = ("target_mean", "target_logvar", "source_latents", "text")
            tensors = [copy_to(getattr(batch, name), self.device).float() for name in names]
            mean, logvar, source_latents, text = tensors
            return Posterior(torch.cat([mean, logvar], 1)), source_latents, text
        vae, text = self.frozen.get()
        source_pixels, target_pixels = (
            copy_to(pixels, self.device) for pixels in (batch.source_pixels, batch.target_pixels)
        )
        distinct = [*dict.fromkeys(batch.instructions)]  # each is encoded once
        rows = torch.tensor([distinct.index(instruction) for instruction in batch.instructions])
        with torch.no_grad():
            both = vae.encode(torch.cat([target_pixels, source_pixels]))
            states = text.encode(distinct).index_select(0, copy_to(rows, self.device))
        mean, source_latents = both.mean.chunk(2)
        logvar, _ = both.logvar.chunk(2)
        return Posterior(torch.cat([mean, logvar], 1)), source_latents, states

    def _unet(self) -> UNet:
        sizes = self.config.model.unet
        if sizes is not None:
            return fresh_network(lambda: UNet(sizes), self.config.run.seed, self.world)
        unet = UNet.load(self.folder / "unet")
        channels = unet.config.in_channels
        start = "widened to 8" if channels == LATENT_CHANNELS else "used as they are"
        self.world.print(f"U-Net from {self.folder}, {channels} input channels, {start}")
        return widen(unet)


class AutoencoderLearner(Learner):
    """The autoencoder, from scratch or tuned: pixel loss and a little of the posterior's KL."""

    part = "vae"

    def build(self) -> None:
        config, device, world = self.config, self.device, self.world
        self.text = TextEncoder.load(self.folder, dtype=None)
        sizes = config.model.vae
        if sizes is None:
            vae = VAE.load(self.folder / "vae")
        else:
            vae = fresh_network(lambda: VAE(sizes), config.run.seed, world)
        _check_resolution(config, vae)
        self.module = self.network = vae.to(device).train()

    def losses(self, batch: Batch) -> Losses:
        """L1 and L2 on pixels, KL per latent value."""
        pixels = copy_to(batch.target_pixels, self.device)
        side = self.config.data.resolution // self.module.config.downscale
        shape = (LATENT_CHANNELS, side, side)
        seed = self.config.run.seed
        noise = torch.stack([unit_noise(shape, seed, "objective", i) for i in batch.indices])
        decoded, posterior = self.network(pixels, copy_to(noise, self.device))
        difference = decoded.float() - pixels
        pixel_loss = (difference.abs() + difference.square()).flatten(1).mean(1)
        kl = posterior.kl() / noise[0].numel()
        losses = pixel_loss + self.config.objective.kl_weight * kl
        return Losses(losses, losses.detach())

    def validate(self, averaged: nn.Module, raw: nn.Module, check: Callable[[], None]) -> Report:
        return validate_autoencoder(averaged, self.held_out, self.world)

    @torch.no_grad()
    def weights(self, module: nn.Module, *, whole: bool) -> Weights:
        """A fresh autoencoder is saved with the scale that gives its latents unit variance."""
        if self.config.model.vae is not None:
            targets = torch.stack([pair.target_pixels01 for pair in self.held_out])
            pixels = pixels_from_pixels01(targets).to(self.device)
            scale = round(1 / module.encode(pixels).mean.std().item(), 5)
            module = copy.copy(module)
            module.config = replace(module.config, scaling_factor=scale)
        return Weights(None, module, self.text if whole else None, self.noise_schedule)


LEARNERS: dict[str, type] = {"edit": EditLearner, "autoencoder": AutoencoderLearner}


def _check_resolution(config: TrainConfig, vae: VAE) -> None:
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
