"""A loaded model that edits pictures: encode, guide, sample, decode (layer 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ipx2p.devices import dtype_name, pick_device, pick_dtype
from ipx2p.diffusion.guidance import Conditions, GuidedDenoiser, make_guidance
from ipx2p.diffusion.samplers import SAMPLERS
from ipx2p.diffusion.schedule import SPACINGS, Plan, Schedule, ScheduleConfig, Step
from ipx2p.errors import InputError, suggestion
from ipx2p.images import (
    fit,
    image_from_pixels01,
    pixels01_from_image,
    pixels01_from_pixels,
    pixels_from_pixels01,
)
from ipx2p.models.text import TextEncoder
from ipx2p.models.unet import LATENT_CHANNELS, UNet
from ipx2p.models.vae import VAE
from ipx2p.seeds import unit_noise
from ipx2p.weights.readers import find_folder

TEXT_BATCH = 32  # sentences encoded at once


@dataclass
class EditSettings:
    """How to edit; the same names in Python, on the command line, in YAML and in tables."""

    sampler: str = "euler_ancestral"
    spacing: str = "linspace"
    num_steps: int = 20
    guidance: str = "ip2p"
    guidance_scale: float = 7.0  # s_T: how strongly to follow the instruction
    image_guidance_scale: float = 1.5  # s_I: how closely to keep to the source

    def check(self) -> None:
        """Raise InputError for an unknown name or an impossible number."""
        for kind, name, known in (
            ("sampler", self.sampler, [*SAMPLERS]),
            ("spacing", self.spacing, SPACINGS),
        ):
            if name not in known:
                raise InputError(f"unknown {kind} {name!r}; {suggestion(name, known)}")
        if self.num_steps < 1:
            raise InputError(f"{self.num_steps} steps asked for, expected 1 or more")
        make_guidance(
            self.guidance,
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
        )


@dataclass
class EditResult:
    """The results of an edit, one entry each.

    images: RGB pictures. pixels01: (3, H, W) in [0, 1]. latents: scaled, (4, h, w). All on the CPU.
    """

    images: list[Image.Image] = field(default_factory=list)
    pixels01: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Request:
    """One edit, ready to be batched with others of its size."""

    image: Image.Image  # source, already at the size of the result
    text: Tensor  # (77, D)
    null_text: Tensor  # (77, D)
    noise: Tensor  # (4, h, w)
    step_noise: Callable[[int], Tensor]  # index of a step -> (4, h, w)


class Editor:
    """Edits pictures by instructions.

    The U-Net computes in its own dtype (its norms accumulate in float32 there too); noise, guidance
    and the sampler's latents are float32. In float32 an edit does not depend on its batch: the same
    noise bit for bit, latents within 1e-4 of their standard deviation.

    Args:
        unet: an edit model, 8 input channels; edits run on its device and in its dtype.
        vae: in its own dtype, whatever the U-Net's. text: likewise.
        schedule: the training schedule of the U-Net.
    """

    def __init__(self, unet: UNet, vae: VAE, text: TextEncoder, schedule: Schedule) -> None:
        if unet.config.in_channels != 2 * LATENT_CHANNELS:
            raise InputError(
                f"the U-Net has {unet.config.in_channels} input channels, an edit model needs 8: "
                "run convert_weights.py with --edit, then train it on edits"
            )
        if unet.config.cross_attention_dim != text.width:
            raise InputError(
                f"the U-Net expects text states of width {unet.config.cross_attention_dim}, the "
                f"text encoder gives {text.width}: these weights do not belong together"
            )
        self.unet = unet
        self.vae = vae
        self.text = text
        self.schedule = schedule

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
            device: `auto` is CUDA where there is one.
            dtype: of the U-Net; `auto` is bfloat16 on CUDA, float32 elsewhere. VAE and text encoder
                are small beside it and stay float32.
        Raises: InputError for a missing or damaged file, or an absent device.
        """
        device = pick_device(str(device))
        dtype = dtype if isinstance(dtype, torch.dtype) else pick_dtype(dtype, device)
        folder = find_folder(weights)
        schedule = Schedule(ScheduleConfig.read(folder / "scheduler" / "scheduler_config.json"))
        text = TextEncoder.load(folder)
        vae = VAE.load(folder / "vae")
        unet = UNet.load(folder / "unet", dtype)
        return cls(unet.to(device), vae.to(device), text.to(device), schedule)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @torch.no_grad()
    def edit(
        self,
        images: Sequence[Image.Image],
        instructions: Sequence[str],
        *,
        sampler: str = EditSettings.sampler,
        spacing: str = EditSettings.spacing,
        num_steps: int = EditSettings.num_steps,
        guidance: str = EditSettings.guidance,
        guidance_scale: float = EditSettings.guidance_scale,
        image_guidance_scale: float = EditSettings.image_guidance_scale,
        seeds: Sequence[int] = (0,),
        resolution: int | None = None,
        negative_instructions: Sequence[str] | None = None,
        noise: Sequence[Tensor] | None = None,
        step_noise: Sequence[Tensor] | None = None,
        batch_size: int = 4,
        batch_branches: bool = True,
        progress: bool = False,
        on_edit: Callable[[int, Image.Image], None] | None = None,
    ) -> EditResult:
        """Edit each picture by its instruction. An edit does not depend on what it runs beside.

        Args:
            images, instructions: one each per edit; pictures of any size and mode.
            seeds: one per edit, or one for all of them.
            resolution: the long side becomes this; None keeps the picture's size. Either way each
                side is rounded to the VAE's multiple.
            negative_instructions: what to steer away from, one per edit; takes the place of the
                empty instruction.
            noise: initial unit noise per edit, (4, h, w), instead of the seed's.
            step_noise: fresh noise per edit, (num_steps, 4, h, w), for samplers that draw some.
            batch_size: edits of one size that run together.
            batch_branches: the branches of guidance in one batch; False takes less memory.
            progress: show a bar.
            on_edit: called with the index and the picture of each edit as soon as it is there.
        Raises: InputError for bad arguments, or when latents or pixels stop being finite.
        """
        settings = EditSettings(
            sampler, spacing, num_steps, guidance, guidance_scale, image_guidance_scale
        )
        settings.check()
        plan = self.schedule.plan(sampler, spacing, num_steps)
        requests = self._requests(
            images, instructions, negative_instructions, seeds, resolution, noise, step_noise, plan
        )
        batches = _batches([request.image.size for request in requests], batch_size)
        done: dict[int, tuple[Image.Image, Tensor, Tensor]] = {}
        with tqdm(total=len(batches) * num_steps, unit="step", disable=not progress) as bar:
            for batch in batches:
                latents = self._sample(
                    [requests[i] for i in batch], settings, plan, batch_branches, bar.update
                )
                for i, x in zip(batch, latents, strict=True):
                    pixels01 = self._decode(x)
                    done[i] = (image_from_pixels01(pixels01), pixels01, x.cpu())
                    if on_edit is not None:
                        on_edit(i, done[i][0])
        columns = zip(*(done[i] for i in range(len(requests))), strict=True)
        return EditResult(*(list(column) for column in columns))

    def _requests(
        self,
        images: Sequence[Image.Image],
        instructions: Sequence[str],
        negative_instructions: Sequence[str] | None,
        seeds: Sequence[int],
        resolution: int | None,
        noise: Sequence[Tensor] | None,
        step_noise: Sequence[Tensor] | None,
        plan: Plan,
    ) -> list[_Request]:
        count = len(images)
        seeds = [*seeds] * count if len(seeds) == 1 else seeds
        negatives = [""] * count if negative_instructions is None else negative_instructions
        for name, values in (
            ("instructions", instructions),
            ("negative_instructions", negatives),
            ("seeds", seeds),
            ("noise", noise),
            ("step_noise", step_noise),
        ):
            if values is not None and len(values) != count:
                raise InputError(f"{count} pictures but {len(values)} {name}, expected one each")
        for instruction in instructions:
            if not instruction.strip():
                raise InputError("the instruction is empty: say what to do with the picture")

        states = self._text_states([*dict.fromkeys([*instructions, *negatives])])
        downscale = self.vae.config.downscale
        fitted: dict[int, Image.Image] = {}  # the same picture may be edited many times
        requests = []
        for i, image in enumerate(images):
            if id(image) not in fitted:
                fitted[id(image)] = fit(image, resolution, downscale)
            width, height = fitted[id(image)].size
            shape = (LATENT_CHANNELS, height // downscale, width // downscale)
            requests.append(
                _Request(
                    image=fitted[id(image)],
                    text=states[instructions[i]],
                    null_text=states[negatives[i]],
                    noise=_initial_noise(noise, i, shape, seeds[i]),
                    step_noise=_step_noise(step_noise, i, (len(plan), *shape), seeds[i]),
                )
            )
        return requests

    def _text_states(self, sentences: list[str]) -> dict[str, Tensor]:
        """State of each sentence, (77, D), on the CPU."""
        states = {}
        for start in range(0, len(sentences), TEXT_BATCH):
            chunk = sentences[start : start + TEXT_BATCH]
            states |= zip(chunk, self.text.encode(chunk).cpu(), strict=True)
        return states

    def _sample(
        self,
        requests: list[_Request],
        settings: EditSettings,
        plan: Plan,
        batch_branches: bool,
        advance: Callable[[], object],
    ) -> Tensor:
        """Edits of one size -> scaled latents, (B, 4, h, w), float32."""

        def stack(tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.stack(tensors).to(self.device, dtype)

        pixels01 = [pixels01_from_image(request.image) for request in requests]
        pixels = stack([pixels_from_pixels01(p) for p in pixels01], self.vae.dtype)
        conditions = Conditions(
            text=stack([r.text for r in requests], self.dtype),
            null_text=stack([r.null_text for r in requests], self.dtype),
            source_latents=self.vae.encode(pixels).mode(),
        )
        guided = GuidedDenoiser(
            self.unet,
            self.schedule,
            make_guidance(
                settings.guidance,
                guidance_scale=settings.guidance_scale,
                image_guidance_scale=settings.image_guidance_scale,
            ),
            conditions,
            batch_branches=batch_branches,
        )
        finite: list[tuple[int, Tensor]] = []

        def denoiser(x: Tensor, sigma: float, step: Step) -> Tensor:
            if not finite or finite[-1][0] != step.index:
                advance()
            denoised = guided(x, sigma, step)
            finite.append((step.index, denoised.isfinite().all()))
            return denoised

        x = stack([r.noise for r in requests]) * plan.start_factor
        x = SAMPLERS[settings.sampler](
            denoiser, x, plan, lambda index: stack([r.step_noise(index) for r in requests])
        )
        self._check_finite(finite, len(plan))
        return x * plan.end_factor

    def _check_finite(self, finite: list[tuple[int, Tensor]], num_steps: int) -> None:
        # Looked at once, at the end: asking after every step would make the device wait.
        bad = (~torch.stack([ok for _, ok in finite])).nonzero().flatten().tolist()
        if bad:
            raise InputError(
                f"latents are not finite from step {finite[bad[0]][0] + 1} of {num_steps} on, "
                f"U-Net in {dtype_name(self.dtype)}: use bfloat16 or float32, or smaller scales"
            )

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents of one edit, (4, h, w) -> pixels in [0, 1], (3, H, W), on the CPU."""
        pixels = self.vae.decode(latents[None].to(self.vae.dtype))[0].float().cpu()
        if not pixels.isfinite().all():
            raise InputError(
                f"decoded pixels are not finite, VAE in {dtype_name(self.vae.dtype)}: "
                "use bfloat16 or float32"
            )
        return pixels01_from_pixels(pixels)


def _batches(sizes: list[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of edits that run together: equal sizes, in order, at most `batch_size`."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected 1 or more")
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        by_size.setdefault(size, []).append(index)
    return [
        indices[start : start + batch_size]
        for indices in by_size.values()
        for start in range(0, len(indices), batch_size)
    ]


def _initial_noise(
    values: Sequence[Tensor] | None, index: int, shape: tuple[int, ...], seed: int
) -> Tensor:
    if values is None:
        return unit_noise(shape, seed, "edit noise")
    return _checked(values, index, shape, "noise")


def _step_noise(
    values: Sequence[Tensor] | None, index: int, shape: tuple[int, ...], seed: int
) -> Callable[[int], Tensor]:
    if values is None:
        return lambda step: unit_noise(shape[1:], seed, "edit step noise", step)
    return _checked(values, index, shape, "step_noise").__getitem__


def _checked(values: Sequence[Tensor], index: int, shape: tuple[int, ...], name: str) -> Tensor:
    if tuple(values[index].shape) != shape:
        raise InputError(
            f"{name}[{index}] has shape {tuple(values[index].shape)}, expected {shape}"
        )
    return values[index].float()
