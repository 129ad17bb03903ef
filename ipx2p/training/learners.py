"""The networks that are trained: the U-Net of an edit model, its autoencoder, or the feature
wrapping of its decoder (layer 4).
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ipx2p.data.cache import EncodedBatch
from ipx2p.data.loader import Batch
from ipx2p.devices import copy_to, pick_dtype
from ipx2p.diffusion.objective import (
    draw,
    drop_conditions,
    hidden_conditions,
    loss_per_sample,
    min_snr_weight,
)
from ipx2p.diffusion.schedule import Schedule
from ipx2p.editing.editor import Editor
from ipx2p.editing.settings import check_window
from ipx2p.errors import InputError
from ipx2p.images import pixels_from_pixels01
from ipx2p.models.flops import counted_flops
from ipx2p.models.text import TextEncoder
from ipx2p.models.unet import LATENT_CHANNELS, UNet, UNetConfig
from ipx2p.models.vae import VAE, Posterior, VAEConfig
from ipx2p.models.wrapping import FeatureWrapping, WrappingConfig
from ipx2p.seeds import unit_noise
from ipx2p.training.learner import (
    FrozenParts,
    Learner,
    Losses,
    check_resolution,
    fresh_network,
    pick_vae,
)
from ipx2p.training.validation import EditValidation, Report, validate_autoencoder
from ipx2p.weights.convert import widen
from ipx2p.weights.folder import Weights

QUARTILES = 4  # of the timesteps


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
        self.frozen = FrozenParts(self.folder, device, config.model.vae_weights)
        vae, text = self.frozen.get()
        self.vae_config = vae.config
        check_resolution(config, vae)
        config.validation.edit.plan(self.schedule)  # raises if there is none

        self.module = self.network = self._unet().to(device).train()
        self.side = config.data.resolution // vae.config.downscale
        self.module.config = copy.copy(self.module.config)
        self.module.config.sample_size = config.edit_resolution // vae.config.downscale
        self.module.config.check("data.resolution")
        check_window(config.validation.edit.window, vae.config, self.module.config)
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
        return Weights(module, *frozen, self.schedule.config, self.edit_settings())

    def networks(self) -> list[nn.Module]:
        return [self.module, *self.frozen.get()]

    def flops_per_sample(self) -> float:
        return counted_flops(self.module.config, self.side, self.side, training=True)

    def edit_settings(self) -> dict[str, Any]:
        """How the model is validated, for its weights folder."""
        return asdict(self.config.validation.edit) | {"resolution": self.config.edit_resolution}

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
            vae = pick_vae(self.folder, config.model.vae_weights)
        else:
            vae = fresh_network(lambda: VAE(sizes), config.run.seed, world)
        check_resolution(config, vae)
        self.module = self.network = vae.to(device).train()

    def losses(self, batch: Batch) -> Losses:
        """L1 and L2 on pixels, KL per latent value."""
        pixels = copy_to(batch.target_pixels, self.device)
        noise = posterior_noise(batch, self.module.config, self.config.run.seed)
        decoded, posterior = self.network(pixels, copy_to(noise, self.device))
        kl = posterior.kl() / noise[0].numel()
        losses = pixel_loss(decoded, pixels) + self.config.objective.kl_weight * kl
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


class WrappingLearner(Learner):
    """Feature wrapping for the decoder of an edit model, whose own networks are all frozen.

    The decoder gets latents of the target, and learns to give the target with the features of the
    source; with its own it would learn to copy. In arXiv:2305.07015 (sec. 3.3) the latents are
    those of finished edits, each at the cost of a whole edit.
    """

    part = "wrapping"

    def build(self) -> None:
        config, device, world = self.config, self.device, self.world
        channels = UNetConfig.read(self.folder / "unet" / "config.json").in_channels
        if channels == LATENT_CHANNELS:
            raise InputError(
                f"{self.folder}: feature wrapping needs an edit model, of 8 input channels, found "
                f"{channels}: train the U-Net on edits first"
            )
        self.model = EditLearner(config, device, self.held_out, world)
        self.model.module.eval().requires_grad_(False)
        self.vae, _ = self.model.frozen.get()
        self.module = FeatureWrapping.find(self.folder, self.vae)
        if self.module is None:
            sizes = WrappingConfig.of(self.vae)
            self.module = fresh_network(lambda: FeatureWrapping(sizes), config.run.seed, world)
        self.module = self.network = self.module.to(device).train()

    def losses(self, batch: Batch) -> Losses:
        """L1 and L2 on pixels, with w = 1."""
        source_pixels, target_pixels = (
            copy_to(pixels, self.device) for pixels in (batch.source_pixels, batch.target_pixels)
        )
        noise = posterior_noise(batch, self.vae.config, self.config.run.seed)
        with torch.no_grad():
            posterior = self.vae.encode(target_pixels)
            latents = self.vae.scale(posterior.sample(noise=copy_to(noise, self.device)))
            features = self.vae.features(source_pixels)
        losses = pixel_loss(self.network(self.vae, latents, features), target_pixels)
        return Losses(losses, losses.detach())

    def validate(self, averaged: nn.Module, raw: nn.Module, check: Callable[[], None]) -> Report:
        editors = (self.editor(module) for module in (averaged, raw))
        return Report(*self.model.validation(*editors, check))

    def weights(self, module: nn.Module, *, whole: bool) -> Weights:
        """The edit model as it was, with the wrapping beside it."""
        how = self.model.edit_settings()
        if not whole:
            return Weights(None, None, None, self.noise_schedule, how, module)
        model = Weights.load(self.folder)
        vae = self.vae if self.config.model.vae_weights else model.vae
        return replace(model, vae=vae, edit_settings=how, wrapping=module)

    def networks(self) -> list[nn.Module]:
        return [self.module, *self.model.networks()]

    def editor(self, module: nn.Module) -> Editor:
        """The model with `module` as its feature wrapping."""
        frozen = self.model.module, *self.model.frozen.get()
        return Editor(*frozen, self.model.schedule, wrapping=module)


def posterior_noise(batch: Batch, config: VAEConfig, seed: int) -> Tensor:
    """Unit noise that samples the latents of a batch, (B, 4, h, w), on the CPU."""
    height, width = (side // config.downscale for side in batch.target_pixels.shape[-2:])
    shape = (LATENT_CHANNELS, height, width)
    return torch.stack([unit_noise(shape, seed, "objective", i) for i in batch.indices])


def pixel_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 and L2 of each sample, float32, (B,)."""
    difference = decoded.float() - pixels
    return (difference.abs() + difference.square()).flatten(1).mean(1)


LEARNERS: dict[str, type] = {
    "edit": EditLearner,
    "autoencoder": AutoencoderLearner,
    "wrapping": WrappingLearner,
}
