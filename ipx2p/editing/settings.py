"""Settings, requests and results of edits (layer 3)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from PIL import Image
from torch import Tensor

from ipx2p.diffusion.guidance.registry import parse_guidance
from ipx2p.diffusion.guidance.spec import GuidanceSpec
from ipx2p.diffusion.samplers import make_plan
from ipx2p.diffusion.schedule import Plan, Schedule, Step
from ipx2p.errors import InputError, suggestion
from ipx2p.fidelity import PLAIN, FidelitySpec, Start, parse_fidelity
from ipx2p.files import read_json
from ipx2p.images import fit_size
from ipx2p.models.unet import LATENT_CHANNELS, UNetConfig
from ipx2p.models.vae import VAEConfig
from ipx2p.names import check_names
from ipx2p.photos import Photo
from ipx2p.published_fields import Bounds, check_bounds, typed_fields
from ipx2p.seeds import unit_noise
from ipx2p.weights.readers import EDIT_SETTINGS

USUAL_RESOLUTION = 512  # for weights that do not say what they were trained at
FAR = 1.5  # from the resolution of the training, as a ratio


@dataclass
class EditSettings:
    """How to edit; Python, command line, YAML and tables use the same names."""

    sampler: str = "euler_ancestral"
    spacing: str = "linspace"
    num_steps: int = 20
    guidance: str = "ip2p"
    guidance_scale: float = 7.0  # s_T: how strongly to follow the instruction
    image_guidance_scale: float = 1.5  # s_I: how closely to keep to the source
    fidelity: str = PLAIN  # what holds invented content down
    window: int = 0  # side of overlapping parts, in pixels; 0: the picture as a whole

    def check(self) -> None:
        """Raise InputError for unknown names, impossible numbers or incompatible choices."""
        check_names(sampler=self.sampler, spacing=self.spacing)
        if self.num_steps < 1:
            raise InputError(f"{self.num_steps} steps asked for, expected 1 or more")
        self.spec.check_sampler(self.sampler)
        parse_fidelity(self.fidelity)

    @property
    def spec(self) -> GuidanceSpec:
        """The guidance, parsed and checked."""
        return parse_guidance(
            self.guidance,
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
        )

    @property
    def knobs(self) -> FidelitySpec:
        """The knobs of fidelity, parsed and checked."""
        return parse_fidelity(self.fidelity)

    @property
    def in_full(self) -> dict[str, str]:
        """The stacks as they would be typed with every parameter that has a value."""
        return {"guidance_in_full": str(self.spec), "fidelity_in_full": str(self.knobs)}

    def plan(self, schedule: Schedule) -> Plan:
        """The noise levels of an edit; InputError for those that the guidance does not allow."""
        plan = make_plan(schedule, self.sampler, self.spacing, self.num_steps)
        if start := self.knobs.find(Start):
            plan = plan.from_source(start.strength)
        self.spec.check_plan(plan)
        return plan

    def but(self, given: Mapping[str, Any]) -> "EditSettings":
        """These, with the values that are given instead of its own; None is not given."""
        values = {one.name: given.get(one.name) for one in fields(EditSettings)}
        return EditSettings(
            **{n: getattr(self, n) if value is None else value for n, value in values.items()}
        )


@dataclass
class FolderSettings(EditSettings):
    """How a weights folder is used where nothing else is said: its `edit_settings.json`.

    `train.py` writes how the model was validated. What the file lacks has the defaults above.
    """

    bounds: ClassVar[Bounds] = {
        "num_steps": (1, 1000),
        "window": (0, 8192),
        "resolution": (1, 8192),
    }

    resolution: int | None = None  # of the long side; None: what the U-Net was trained at

    @classmethod
    def read(cls, folder: Path) -> "FolderSettings":
        """Of a weights folder; InputError names the file, and the value that cannot be."""
        path = folder / EDIT_SETTINGS
        raw = read_json(path) if path.exists() else {}
        known = [one.name for one in fields(cls)]
        for name in (name for name in raw if name not in known):
            raise InputError(f"{path}: unknown key {name!r:.60}; {suggestion(name, known)}")
        settings = cls(**typed_fields(cls, raw, str(path)))
        sizes = {n: value for n, value in vars(settings).items() if value is not None}
        check_bounds(sizes, cls.bounds, str(path))
        try:
            settings.check()
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return settings


class Evaluation(NamedTuple):
    """One evaluation of a sampler's denoiser on a batch; latents are float32, (B, 4, h, w).

    edits: index of each edit of the batch. step: of the sampler; Heun's method evaluates most steps
    twice. x: noisy latents, x0 + sigma n. denoised: the guided estimate of x0. evaluations: of the
    network so far, for each edit.
    """

    edits: list[int]
    step: Step
    x: Tensor
    sigma: float
    denoised: Tensor
    evaluations: float


class Edited(NamedTuple):
    """One finished edit; the fields are those of `EditResult`."""

    image: Image.Image
    pixels01: Tensor
    latents: Tensor
    evaluations: float
    seconds: float
    photo: Photo | None = None


@dataclass
class EditResult:
    """Results, one entry for each edit.

    images: RGB pictures. pixels01: (3, H, W) in [0, 1]. latents: scaled, (4, h, w), as they were
    sampled: masks and knobs of pixels come after them. All on the CPU.
    evaluations: of the network, in all windows; those of a weak one count as much, those of the
    shallow part as their share of the FLOPs. seconds: from encoding the source to decoding the
    result; edits of one batch share its time. photos: None; or, at full size, the pictures at the
    depth of their originals, with profile and EXIF, which `save` writes.
    """

    images: list[Image.Image] = field(default_factory=list)
    pixels01: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    photos: list[Photo | None] = field(default_factory=list)

    def __repr__(self) -> str:
        sizes = ", ".join(dict.fromkeys(f"{i.width} x {i.height}" for i in self.images))
        cost = f"{sum(self.evaluations):g} evaluations, {sum(self.seconds):.1f} s"
        return f"EditResult({len(self.images)} images, {sizes or 'no'} pixels, {cost})"


def check_needs(settings: EditSettings, negatives: Sequence[str] | None, has_weak: bool) -> None:
    """Raise InputError if guidance lacks the second network or negative instruction it needs."""
    guidance = settings.spec
    for name in guidance.needs("weak"):
        if not has_weak:
            raise InputError(
                f"guidance {name} needs a second, weaker network: --weak-weights, in Python "
                "weak=editor.load_weak(WEIGHTS)"
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
                "Python negative_instructions"
            )


def check_unet(unet: UNetConfig, text_width: int) -> None:
    """Raise InputError unless it is an edit model for text states of this width."""
    if unet.in_channels != 2 * LATENT_CHANNELS:
        raise InputError(
            f"the U-Net has {unet.in_channels} input channels, an edit model needs 8: "
            "run convert_weights.py with --edit, then train it on edits"
        )
    if unet.cross_attention_dim != text_width:
        raise InputError(
            f"the U-Net expects text states of width {unet.cross_attention_dim}, the "
            f"text encoder gives {text_width}: these weights do not belong together"
        )


def check_window(window: int, vae: VAEConfig, unet: UNetConfig) -> None:
    """Raise InputError for a window that the autoencoder and the U-Net cannot halve evenly."""
    multiple = vae.downscale * 2 ** (unet.levels - 1)
    if window < 0 or window % multiple:
        raise InputError(
            f"window is {window} pixels, expected a multiple of {multiple} for this model, or 0 "
            "for the picture as a whole"
        )


def pick_resolution(
    folder: Path, resolution: int | None, window: int = 0
) -> tuple[int, int, list[str]]:
    """The long side to edit at: what is asked for, or what a weights folder says or was trained at.

    Returns: the resolution; the multiple that sides are rounded to, in pixels; and warnings about
    rounding, or a size far from that of the training, which the window has if there is one.
    Raises: InputError for a size or window that cannot be.
    """
    vae = VAEConfig.read(folder / "vae" / "config.json")
    unet = UNetConfig.read(folder / "unet" / "config.json")
    check_window(window, vae, unet)
    multiple = vae.downscale
    trained = (unet.sample_size or 0) * multiple
    trained = FolderSettings.read(folder).resolution or trained
    if resolution is None:
        resolution = trained or USUAL_RESOLUTION
    if resolution < 1:
        raise InputError(f"resolution is {resolution}, expected 1 or more pixels")
    notes = []
    rounded, _ = fit_size(resolution, resolution, None, multiple)
    if rounded != resolution:
        notes.append(
            f"resolution {resolution} is rounded to {rounded}: the autoencoder needs a multiple of "
            f"{multiple}"
        )
    name, seen = min(("resolution", rounded), ("window", window or rounded), key=itemgetter(1))
    if trained and not trained / FAR <= seen <= trained * FAR:
        notes.append(
            f"{name} {seen} is far from the {trained} pixels that the model was trained at: "
            "edits may be poor"
        )
    return resolution, multiple, notes


@dataclass(frozen=True)
class Request:
    """One edit, ready to be batched with others of the same size."""

    index: int  # among the edits of a call
    image: Image.Image  # source, already at the size of the result
    text: Tensor  # (77, D)
    negative_text: Tensor  # (77, D)
    seed: int
    noise: Tensor  # (4, h, w)
    step_noise: Callable[[int], Tensor]  # index of a step -> (4, h, w)
    knobs: FidelitySpec

    def text_noise(self, step: int) -> Tensor:
        """Noise for the text states of the instruction at one step, (77, D)."""
        return unit_noise(self.text.shape, self.seed, "edit text noise", step)


def check_noise(name: str, values: Sequence[Tensor], index: int, shape: tuple[int, ...]) -> Tensor:
    """One of the tensors that are given as noise, float32; InputError for another shape."""
    if tuple(values[index].shape) != shape:
        raise InputError(
            f"{name}[{index}] has shape {tuple(values[index].shape)}, expected {shape}"
        )
    return values[index].float()


def check_instructions(instructions: Iterable[str]) -> None:
    """Raise InputError if one is empty."""
    if not all(instruction.strip() for instruction in instructions):
        raise InputError("the instruction is empty: say what to do with the picture")


def spread(**values: Any) -> list[list]:
    """Lists of equal length: a single value or a list of one is repeated.

    Pictures come first: without any, all lists are empty.
    """
    lists = {
        name: [value] if isinstance(value, str) or not isinstance(value, Iterable) else [*value]
        for name, value in values.items()
    }
    pictures = len(next(iter(lists.values())))
    count = max(map(len, lists.values())) if pictures else 0
    for name, value in lists.items():
        if len(value) not in (1, count):
            if len(value) == pictures:  # the others are too many
                name, value = max(lists.items(), key=lambda item: len(item[1]))
            raise InputError(
                f"{pictures} pictures but {len(value)} {name}: give one for each, or one for all"
            )
    return [value * count if len(value) == 1 else value for value in lists.values()]


def in_batches(sizes: list[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of the edits of each batch: equal sizes, in order, at most `batch_size`."""
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
