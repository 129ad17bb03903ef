"""A loaded model that edits pictures: encode, guide, sample, decode (layer 3)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ipx2p.devices import dtype_name, pick_device, pick_dtype
from ipx2p.diffusion.guidance.branches import Conditions
from ipx2p.diffusion.guidance.denoiser import GuidedDenoiser
from ipx2p.diffusion.samplers import SAMPLERS
from ipx2p.diffusion.schedule import Plan, Schedule, ScheduleConfig, Step
from ipx2p.diffusion.windows import Windows
from ipx2p.editing.decoding import check_wrapping, decode
from ipx2p.editing.full_size import at_full_size, transfer_name
from ipx2p.editing.settings import (
    Edited,
    EditResult,
    EditSettings,
    Evaluation,
    FolderSettings,
    Request,
    check_instructions,
    check_needs,
    check_noise,
    check_unet,
    check_window,
    in_batches,
    spread,
)
from ipx2p.errors import InputError, NotFiniteError
from ipx2p.fidelity import Wrap
from ipx2p.images import (
    fit,
    image_from_pixels01,
    load_image,
    pixels01_from_image,
    pixels01_from_pixels,
    pixels_from_pixels01,
)
from ipx2p.models.flops import shallow_share
from ipx2p.models.text import TextEncoder
from ipx2p.models.unet import LATENT_CHANNELS, UNet
from ipx2p.models.vae import VAE
from ipx2p.models.wrapping import FeatureWrapping
from ipx2p.seeds import unit_noise
from ipx2p.weights.readers import find_folder

TEXT_BATCH = 32  # sentences encoded at once
Picture = Image.Image | str | Path


class Editor:
    """Edits pictures by instructions.

    The U-Net computes in its own dtype (with norms accumulated in float32); noise, guidance and the
    sampler's latents are float32. In float32 an edit does not depend on its batch: its noise is the
    same bit for bit, its latents within 1e-4 of their standard deviation.

    Args:
        unet: an edit model, 8 input channels; edits run on its device and in its dtype.
        vae, text: on the same device, each in its own dtype.
        schedule: the training schedule of the U-Net.
        settings: of edits where nothing else is said; None: the defaults of `EditSettings`.
        wrapping: feature wrapping of the autoencoder, on its device and in its dtype, if there is.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text: TextEncoder,
        schedule: Schedule,
        settings: FolderSettings | None = None,
        wrapping: FeatureWrapping | None = None,
    ) -> None:
        check_unet(unet.config, text.width)
        self.unet = unet
        self.vae = vae
        self.text = text
        self.schedule = schedule
        self.settings = settings or FolderSettings()
        self.wrapping = wrapping

    @classmethod
    def load(
        cls,
        weights: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> "Editor":
        """Load a weights folder or hub id.

        Args:
            device: `auto` is CUDA if available, else the CPU.
            dtype: of the U-Net; `auto` is bfloat16 on CUDA, float32 elsewhere. VAE and text encoder
                are small and stay in float32.
        Raises: InputError for a missing or damaged file, or an absent device.
        """
        device = pick_device(str(device))
        dtype = dtype if isinstance(dtype, torch.dtype) else pick_dtype(dtype, device)
        folder = find_folder(weights)
        settings = FolderSettings.read(folder)
        schedule = Schedule(ScheduleConfig.load(folder))
        text = TextEncoder.load(folder)
        vae = VAE.load(folder / "vae").to(device)
        unet = UNet.load(folder / "unet", dtype).to(device)
        wrapping = FeatureWrapping.find(folder, vae)
        wrapping = wrapping and wrapping.to(device)
        return cls(unet, vae, text.to(device), schedule, settings, wrapping)

    def load_weak(self, weights: str | Path) -> UNet:
        """The U-Net of another weights folder or hub id, as the weak network of guidance.

        Raises: InputError unless it was trained with the same noise levels and prediction type.
        """
        folder = find_folder(weights)
        theirs, ours = asdict(ScheduleConfig.load(folder)), asdict(self.schedule.config)
        for name in ours.keys() - {"steps_offset"}:  # only says where a spacing starts
            if theirs[name] != ours[name]:
                raise InputError(
                    f"{folder}: {name} is {theirs[name]!r}, that of the edit model is "
                    f"{ours[name]!r}: the weak network must match it"
                )
        unet = UNet.load(folder / "unet", self.dtype).to(self.device)
        check_unet(unet.config, self.text.width)
        return unet

    def _check_weak(self, weak: UNet | None) -> None:
        if weak is None:
            return
        check_unet(weak.config, self.text.width)
        ours, theirs = self.unet.conv_in.weight, weak.conv_in.weight
        for name in ("dtype", "device"):
            if getattr(ours, name) != getattr(theirs, name):
                raise InputError(
                    f"{name} of the weak network is {getattr(theirs, name)}, that of the edit "
                    f"model {getattr(ours, name)}: load it with editor.load_weak"
                )

    def __repr__(self) -> str:
        millions = sum(p.numel() for p in self.unet.parameters()) / 1e6
        size = f"{self.resolution} px" if self.resolution else "unknown resolution"
        where = f"{dtype_name(self.dtype)} on {self.device}"
        return f"Editor(U-Net of {millions:.1f} M parameters, {size}, {where})"

    @property
    def resolution(self) -> int | None:
        """Of the settings, else pixels of the training pictures; None if neither is known."""
        size = self.unet.config.sample_size
        return self.settings.resolution or (size and size * self.vae.config.downscale)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @torch.no_grad()
    def edit(
        self,
        images: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        *,
        sampler: str | None = None,
        spacing: str | None = None,
        num_steps: int | None = None,
        guidance: str | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        fidelity: str | None = None,
        window: int | None = None,
        seeds: int | Sequence[int] = 0,
        resolution: int | Literal["usual"] | None = "usual",
        full_size: bool | str = False,
        negative_instructions: str | Sequence[str] | None = None,
        weak: UNet | None = None,
        noise: Sequence[Tensor] | None = None,
        step_noise: Sequence[Tensor] | None = None,
        batch_size: int = 4,
        batch_branches: bool = True,
        progress: bool = False,
        on_edit: Callable[[int, Edited], None] | None = None,
        on_step: Callable[[Evaluation], None] | None = None,
    ) -> EditResult:
        """Edit pictures by instructions. An edit does not depend on the others of its batch.

        Args:
            images: Pillow pictures or paths, of any size and mode. Of images, instructions, seeds
                and negative_instructions, give one for each edit, or one for all of them.
            sampler, ..., window: None is what `self.settings` say. Of the last two, see
                `ipx2p.fidelity` and `ipx2p.diffusion.windows`.
            resolution: the long side becomes this; `usual` is what `self.settings` say; None, here
                or there, keeps the picture's size. Each side is rounded to the VAE's multiple.
            full_size: carry the edit over to the original, by a transfer of `ipx2p.transfer`; True
                is `auto`. Images, pixels01 and photos then have the original's size.
            negative_instructions: what to steer away from; they replace the empty instruction,
                unless the guidance has its own branch for them.
            weak: a second, weaker U-Net for guidance that needs one; see `load_weak`.
            noise: initial unit noise for each edit, (4, h, w), instead of the seed's.
            step_noise: fresh noise for each edit, (num_steps, 4, h, w), for samplers that use it.
            batch_size: how many edits of one size run together.
            batch_branches: run the branches of guidance in one batch; False takes less memory.
            progress: show a bar.
            on_edit: called with the index of each edit and its result as soon as it is finished.
            on_step: called at each evaluation of the sampler's denoiser.
        Raises: InputError for bad arguments, or when latents or pixels stop being finite.
        """
        scales = (guidance_scale, image_guidance_scale)
        asked = (sampler, spacing, num_steps, guidance, *scales, fidelity, window)
        names = (one.name for one in fields(EditSettings))
        settings = self.settings.but(dict(zip(names, asked, strict=True)))
        settings.check()
        if settings.knobs.find(Wrap):
            check_wrapping(self.wrapping)
        transfer = transfer_name(full_size)
        if resolution == "usual":
            resolution = self.settings.resolution
        negatives = "" if negative_instructions is None else negative_instructions
        columns = spread(
            images=images, instructions=instructions, negative_instructions=negatives, seeds=seeds
        )
        check_needs(settings, columns[2], weak is not None)
        self._check_weak(weak)
        settings.spec.check_layers(self.unet.attention_layers)
        plan = settings.plan(self.schedule)
        requests = self._requests(*columns, resolution, noise, step_noise, settings)
        batches = in_batches([request.image.size for request in requests], batch_size)
        done: dict[int, Edited] = {}
        with tqdm(total=len(batches) * len(plan), unit="step", disable=not progress) as bar:
            for batch in batches:
                started_at = time.perf_counter()
                mine = [requests[i] for i in batch]
                latents, guided = self._sample(
                    mine, settings, plan, weak, batch_branches, bar.update, on_step
                )
                shared_s = (time.perf_counter() - started_at) / len(batch)
                for place, i in enumerate(batch):
                    done[i] = self._finish(requests[i], latents, guided, place, shared_s)
                    if transfer is not None:
                        original = columns[0][i]
                        done[i] = at_full_size(done[i], original, requests[i].image, transfer)
                    if on_edit is not None:
                        on_edit(i, done[i])
        return EditResult(*map(list, zip(*(done[i] for i in sorted(done)), strict=True)))

    def _requests(
        self,
        images: Sequence[Picture],
        instructions: Sequence[str],
        negatives: Sequence[str],
        seeds: Sequence[int],
        resolution: int | None,
        noise: Sequence[Tensor] | None,
        step_noise: Sequence[Tensor] | None,
        settings: EditSettings,
    ) -> list[Request]:
        """Bring the pictures to their final size, encode the sentences, and draw the noise."""
        check_instructions(instructions)
        check_window(settings.window, self.vae.config, self.unet.config)
        for name, values in (("noise", noise), ("step_noise", step_noise)):
            if values is not None and len(values) != len(images):
                raise InputError(f"{len(images)} edits but {len(values)} {name}, expected one each")
        sentences = [*dict.fromkeys([*instructions, *negatives])]
        states: dict[str, Tensor] = {}  # of each sentence, (77, D), on the CPU
        for start in range(0, len(sentences), TEXT_BATCH):
            chunk = sentences[start : start + TEXT_BATCH]
            states |= zip(chunk, self.text.encode(chunk).cpu(), strict=True)
        multiple = self.vae.config.downscale
        fitted: dict[Any, Image.Image] = {}  # the same picture may be edited many times
        requests = []
        for i, (image, seed) in enumerate(zip(images, seeds, strict=True)):
            is_path = isinstance(image, str | Path)
            key = str(image) if is_path else id(image)
            if key not in fitted:
                fitted[key] = fit(load_image(image) if is_path else image, resolution, multiple)
            width, height = fitted[key].size
            shape = (LATENT_CHANNELS, height // multiple, width // multiple)
            draw = partial(unit_noise, shape, seed)
            first = draw("edit noise") if noise is None else check_noise("noise", noise, i, shape)
            if step_noise is None:
                later = partial(draw, "edit step noise")
            else:
                of_all = (settings.num_steps, *shape)
                later = check_noise("step_noise", step_noise, i, of_all).__getitem__
            texts = (states[instructions[i]], states[negatives[i]])
            requests.append(Request(i, fitted[key], *texts, seed, first, later, settings.knobs))
        return requests

    def _sample(
        self,
        requests: list[Request],
        settings: EditSettings,
        plan: Plan,
        weak: UNet | None,
        batch_branches: bool,
        advance: Callable[[], object],
        on_step: Callable[[Evaluation], None] | None,
    ) -> tuple[Tensor, GuidedDenoiser]:
        """Edits of one size -> scaled latents, (B, 4, h, w), float32, and what guided them."""

        def stack(tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.stack(tensors).to(self.device, dtype)

        pixels01 = [pixels01_from_image(request.image) for request in requests]
        pixels = stack([pixels_from_pixels01(p) for p in pixels01], self.vae.dtype)
        tile = self.vae.tile_for(*pixels.shape[-2:], batch=len(pixels))
        source_latents = self.vae.encode(pixels, tile).mode()
        guidance = settings.spec
        negative_text = stack([r.negative_text for r in requests], self.dtype)
        empty = self.text.encode([""]).to(negative_text).expand_as(negative_text)
        conditions = Conditions(
            text=stack([r.text for r in requests], self.dtype),
            null_text=empty if guidance.needs("negative") else negative_text,
            negative_text=negative_text,
            source_latents=source_latents,
            latents=self.vae.config.scale(source_latents).float(),
            text_noise=lambda index: stack([r.text_noise(index) for r in requests]),
        )
        guided = self._guided(settings, conditions, weak, batch_branches)
        finite: list[tuple[int, Tensor]] = []

        def denoiser(x: Tensor, sigma: float, step: Step) -> Tensor:
            if not finite or finite[-1][0] != step.index:
                advance()
            denoised = guided(x, sigma, step)
            finite.append((step.index, denoised.isfinite().all()))
            if on_step is not None:
                edits = [request.index for request in requests]
                on_step(Evaluation(edits, step, x, sigma, denoised, guided.evaluations))
            return denoised

        noise = stack([r.noise for r in requests])
        if plan.start_factor is None or guidance.mask is not None:  # the source under noise
            x = conditions.latents + noise * plan.sigmas[0]
        else:
            x = noise * plan.start_factor
        x = SAMPLERS[settings.sampler](
            denoiser, x, plan, lambda index: stack([r.step_noise(index) for r in requests])
        )
        # Checked once, at the end: a check after every step would make the device wait.
        all_finite = torch.stack([ok for _, ok in finite]).tolist()
        if False in all_finite:
            raise NotFiniteError(
                f"latents are not finite from step {finite[all_finite.index(False)][0] + 1} of "
                f"{settings.num_steps} on, U-Net in {dtype_name(self.dtype)}: use bfloat16 or "
                "float32, or smaller scales"
            )
        return x * plan.end_factor, guided

    def _guided(
        self, settings: EditSettings, shown: Conditions, weak: UNet | None, batch_branches: bool
    ) -> GuidedDenoiser:
        """What guides a batch; its networks see the picture in windows, if there are any."""
        size = settings.window // self.vae.config.downscale
        unet, weak = (Windows(n, size) if n and size else n for n in (self.unet, weak))
        return GuidedDenoiser(
            unet,
            self.schedule,
            settings.spec,
            shown,
            batch_branches=batch_branches,
            weak=weak,
            attention_layers=self.unet.attention_layers,
            shallow_share=lambda h, w: shallow_share(
                self.unet.config, *(min(side, size or side) for side in (h, w))
            ),
        )

    def _finish(
        self, request: Request, latents: Tensor, guided: GuidedDenoiser, place: int, shared_s: float
    ) -> Edited:
        """Decode the edit at this place of a batch; `shared_s` is its share of sampling time."""
        started_at = time.perf_counter()
        wrap, latent = request.knobs.find(Wrap) or Wrap(0.0), latents[place : place + 1]
        pixels = decode(self.vae, latent, request.image, self.wrapping, wrap.weight)
        source01, pixels01 = pixels01_from_image(request.image), pixels01_from_pixels(pixels)
        if guided.mask is not None:  # where it is 0, the source
            mask, size = guided.mask[place : place + 1].cpu(), pixels.shape[-2:]
            mask = F.interpolate(mask, size, mode="bilinear", align_corners=False)[0]
            pixels01 = torch.lerp(source01, pixels01, mask)
        pixels01 = request.knobs.apply(source01, pixels01)
        image, seconds = image_from_pixels01(pixels01), shared_s + time.perf_counter() - started_at
        return Edited(image, pixels01, latents[place].cpu(), guided.evaluations, seconds)
