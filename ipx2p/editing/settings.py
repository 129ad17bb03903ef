"""What an edit is asked for and what it gives: settings, requests, results (layer 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ipx2p.diffusion.guidance.registry import parse_guidance
from ipx2p.diffusion.guidance.spec import GuidanceSpec
from ipx2p.diffusion.samplers import check_names
from ipx2p.errors import InputError
from ipx2p.images import fit
from ipx2p.models.unet import LATENT_CHANNELS
from ipx2p.seeds import unit_noise


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
        """Raise InputError for an unknown name, an impossible number, or what does not couple."""
        check_names(self.sampler, self.spacing)
        if self.num_steps < 1:
            raise InputError(f"{self.num_steps} steps asked for, expected 1 or more")
        self.spec.check_sampler(self.sampler)

    @property
    def spec(self) -> GuidanceSpec:
        """The guidance, parsed and checked."""
        return parse_guidance(
            self.guidance,
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
        )


class Edited(NamedTuple):
    """One finished edit; the fields are those of `EditResult`."""

    image: Image.Image
    pixels01: Tensor
    latents: Tensor
    evaluations: int
    seconds: float


@dataclass
class EditResult:
    """The results of an edit, one entry each.

    images: RGB pictures. pixels01: (3, H, W) in [0, 1]. latents: scaled, (4, h, w). All on the CPU.
    evaluations: of the network, for each edit; those of a weak one count as much.
    seconds: from encoding the source to decoding the result; edits of one batch share its time.
    """

    images: list[Image.Image] = field(default_factory=list)
    pixels01: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def check_needs(settings: EditSettings, negatives: Sequence[str] | None, has_weak: bool) -> None:
    """Raise InputError for guidance that lacks its second network or negative instruction."""
    guidance = settings.spec
    for name in guidance.needs("weak"):
        if not has_weak:
            raise InputError(
                f"guidance {name} needs a second, weaker network: --weak-weights, in "
                "Python weak=editor.load_weak(WEIGHTS)"
            )
    if has_weak and not guidance.needs("weak"):
        raise InputError(
            f"a weak network is given, but guidance {settings.guidance} does not use one: add "
            "+autoguidance, or leave it out"
        )
    for name in guidance.needs("negative"):
        if negatives is None or not all(negative.strip() for negative in negatives):
            raise InputError(
                f"guidance {name} needs a negative instruction: --negative-instruction TEXT, in "
                "Python negative_instructions, one per edit"
            )


@dataclass(frozen=True)
class Request:
    """One edit, ready to be batched with others of its size."""

    image: Image.Image  # source, already at the size of the result
    text: Tensor  # (77, D)
    negative_text: Tensor  # (77, D)
    seed: int
    noise: Tensor  # (4, h, w)
    step_noise: Callable[[int], Tensor]  # index of a step -> (4, h, w)

    def text_noise(self, step: int) -> Tensor:
        """Noise for the states of the instruction in one step, (77, D)."""
        return unit_noise(self.text.shape, self.seed, "edit text noise", step)


def make_requests(
    images: Sequence[Image.Image],
    instructions: Sequence[str],
    *,
    negative_instructions: Sequence[str] | None,
    seeds: Sequence[int],
    resolution: int | None,
    noise: Sequence[Tensor] | None,
    step_noise: Sequence[Tensor] | None,
    num_steps: int,
    downscale: int,
    encode: Callable[[list[str]], dict[str, Tensor]],
) -> list[Request]:
    """Check and pair up the arguments of `Editor.edit`; pictures come to their final size.

    Args:
        downscale: pixels per latent pixel. encode: sentences -> the states of each, (77, D).
    """
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

    states = encode([*dict.fromkeys([*instructions, *negatives])])
    fitted: dict[int, Image.Image] = {}  # the same picture may be edited many times
    requests = []
    for i, image in enumerate(images):
        if id(image) not in fitted:
            fitted[id(image)] = fit(image, resolution, downscale)
        width, height = fitted[id(image)].size
        shape = (LATENT_CHANNELS, height // downscale, width // downscale)
        requests.append(
            Request(
                image=fitted[id(image)],
                text=states[instructions[i]],
                negative_text=states[negatives[i]],
                seed=seeds[i],
                noise=_initial_noise(noise, i, shape, seeds[i]),
                step_noise=_step_noise(step_noise, i, (num_steps, *shape), seeds[i]),
            )
        )
    return requests


def in_batches(sizes: list[tuple[int, int]], batch_size: int) -> list[list[int]]:
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
