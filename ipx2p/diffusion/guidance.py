"""Guidance: blend the predictions of several condition branches into one (layer 1).

An edit has two conditions, the source picture and the instruction, so there are four branches:
`full` (both), `image` (source only), `text` (instruction only) and `null` (neither). A linear
scheme is one coefficient per branch, summing to 1; branches with coefficient 0 are not run. Linear
schemes agree in any prediction space, so they blend denoised latents.

`guidance_scale` is s_T of InstructPix2Pix (arXiv:2211.09800, sec. 3.2.1), the push along the
instruction; `image_guidance_scale` is s_I, the push towards the source.
Shapes: B edits, 4 x h x w latents.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ipx2p.diffusion.denoiser import denoise
from ipx2p.diffusion.schedule import Schedule, Step
from ipx2p.errors import InputError, suggestion


@dataclass(frozen=True)
class Branch:
    """One evaluation of the network: which of the conditions it is shown."""

    name: str
    instruction: bool
    source: bool


BRANCHES = {
    branch.name: branch
    for branch in (
        Branch("full", instruction=True, source=True),
        Branch("image", instruction=False, source=True),
        Branch("text", instruction=True, source=False),
        Branch("null", instruction=False, source=False),
    )
}


def ip2p(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """Source first, then the instruction on top of it (arXiv:2211.09800, eq. 3).

    null + s_I (image - null) + s_T (full - image). Scales (1, 1) give the full branch.
    """
    return {
        "null": 1 - image_guidance_scale,
        "image": image_guidance_scale - guidance_scale,
        "full": guidance_scale,
    }


def text_first(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """Instruction first, then the source on top of it: the other order of the same factorisation.

    null + s_T (text - null) + s_I (full - text). Scales (1, 1) give the full branch.
    """
    return {
        "null": 1 - guidance_scale,
        "text": guidance_scale - image_guidance_scale,
        "full": image_guidance_scale,
    }


def joint(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """Both conditions as one (classifier-free guidance, arXiv:2207.12598); s_I is not used.

    null + s_T (full - null). Scale 1 gives the full branch.
    """
    return {"null": 1 - guidance_scale, "full": guidance_scale}


def text_only(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """Guide along the instruction, take the source as it is; s_I is not used.

    image + s_T (full - image). Scale 1 gives the full branch.
    """
    return {"image": 1 - guidance_scale, "full": guidance_scale}


def image_only(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """Guide towards the source, take the instruction as it is; s_T is not used.

    text + s_I (full - text). Scale 1 gives the full branch.
    """
    return {"text": 1 - image_guidance_scale, "full": image_guidance_scale}


def symmetric(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """Neither condition first (InstructDiffusion, arXiv:2309.03895).

    (image + text) / 2 + s_T (full - image) + s_I (full - text). Scales (0.5, 0.5) give the full
    branch, so they do not compare with those of `ip2p`.
    """
    return {
        "image": 0.5 - guidance_scale,
        "text": 0.5 - image_guidance_scale,
        "full": guidance_scale + image_guidance_scale,
    }


def composable(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """Each condition on its own, summed (composable diffusion, arXiv:2206.01714).

    null + s_I (image - null) + s_T (text - null). Never the full branch.
    """
    return {
        "null": 1 - image_guidance_scale - guidance_scale,
        "image": image_guidance_scale,
        "text": guidance_scale,
    }


def full(
    guidance_scale: float, image_guidance_scale: float, *, joint_scale: float = 1.0
) -> dict[str, float]:
    """`composable` plus what only both conditions together say, times `joint_scale` (s_J).

    null + s_I (image - null) + s_T (text - null) + s_J (full - image - text + null).
    All three scales 1 give the full branch; all three equal give `joint`.
    """
    return {
        "null": 1 - image_guidance_scale - guidance_scale + joint_scale,
        "image": image_guidance_scale - joint_scale,
        "text": guidance_scale - joint_scale,
        "full": joint_scale,
    }


def nested(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """Guidance inside guidance: s_I pushes the whole of the edit (ComfyUI's nested dual guidance).

    null + s_I (image + s_T (full - image) - null) = `ip2p` at s_T' = s_T s_I. Scales (1, 1) give
    the full branch.
    """
    return ip2p(guidance_scale * image_guidance_scale, image_guidance_scale)


SCHEMES: dict[str, Callable[..., dict[str, float]]] = {
    scheme.__name__: scheme
    for scheme in (
        ip2p,
        text_first,
        joint,
        text_only,
        image_only,
        symmetric,
        composable,
        full,
        nested,
    )
}


@dataclass(frozen=True)
class LinearGuidance:
    """A fixed weighted sum of branches."""

    coefficients: dict[Branch, float]  # of the branches that are run, never 0

    def branches(self, sigma: float, step: Step) -> list[Branch]:
        """The branches to run at this noise level of this step."""
        return [*self.coefficients]

    def blend(self, denoised: dict[Branch, Tensor], x: Tensor, sigma: float, step: Step) -> Tensor:
        """Denoised latents of the branches at x -> the guided ones, (B, 4, h, w), float32."""
        return sum(weight * denoised[branch] for branch, weight in self.coefficients.items())


def make_guidance(
    spec: str, *, guidance_scale: float, image_guidance_scale: float
) -> LinearGuidance:
    """Build a scheme from its name, with parameters after a colon: `full:joint_scale=5`.

    Raises: InputError for an unknown scheme or parameter, or a scale that is not a finite number.
    """
    name, _, settings = spec.partition(":")
    if name not in SCHEMES:
        raise InputError(f"unknown guidance scheme {name!r}; {suggestion(name, [*SCHEMES])}")
    for scale_name, scale in (
        ("guidance_scale", guidance_scale),
        ("image_guidance_scale", image_guidance_scale),
    ):
        if not math.isfinite(scale):
            raise InputError(f"{scale_name} is {scale}, expected a finite number such as 7.0")
    coefficients = SCHEMES[name](
        guidance_scale, image_guidance_scale, **_parameters(name, settings)
    )
    # Rounding leaves 1e-16 where scales cancel; such a branch must not cost an evaluation.
    kept = {BRANCHES[name]: c for name, c in coefficients.items() if abs(c) > 1e-9}
    return LinearGuidance(kept)


def _parameters(name: str, settings: str) -> dict[str, float]:
    signature = inspect.signature(SCHEMES[name])
    known = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if key not in known:
            names = suggestion(key, known) if known else "it has none"
            raise InputError(f"guidance scheme {name} has no parameter {key!r}; {names}")
        try:
            parameters[key] = float(value)
        except ValueError:
            raise InputError(f"guidance {name}:{setting}: {value!r} is not a number") from None
        if not math.isfinite(parameters[key]):
            raise InputError(f"guidance {name}:{setting}: {value} is not a finite number")
    return parameters


@dataclass(frozen=True)
class Conditions:
    """What the branches are shown: text and null text (B, 77, D), source latents (B, 4, h, w)."""

    text: Tensor
    null_text: Tensor
    source_latents: Tensor

    def of(self, branch: Branch) -> tuple[Tensor, Tensor]:
        """Text states and source latents of one branch."""
        text = self.text if branch.instruction else self.null_text
        source = self.source_latents if branch.source else torch.zeros_like(self.source_latents)
        return text, source


class GuidedDenoiser:
    """D(x, sigma, step) of an edit: run the branches that the scheme asks for and blend them.

    Args:
        network: `UNet.forward` or the like.
        guidance: says which branches run and blends them.
        conditions: what the branches are shown.
        batch_branches: all branches in one batch, or one after another (less memory).
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        schedule: Schedule,
        guidance: LinearGuidance,
        conditions: Conditions,
        *,
        batch_branches: bool = True,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.guidance = guidance
        self.conditions = conditions
        self.batch_branches = batch_branches

    def __call__(self, x: Tensor, sigma: float, step: Step) -> Tensor:
        """x at noise level sigma, (B, 4, h, w), float32 -> guided denoised latents."""
        branches = self.guidance.branches(sigma, step)
        shown = [self.conditions.of(branch) for branch in branches]
        if self.batch_branches:
            text, source = (torch.cat(parts) for parts in zip(*shown, strict=True))
            together = self._denoise(x.repeat(len(branches), 1, 1, 1), sigma, text, source)
            denoised = together.chunk(len(branches))
        else:
            denoised = [self._denoise(x, sigma, text, source) for text, source in shown]
        return self.guidance.blend(dict(zip(branches, denoised, strict=True)), x, sigma, step)

    def _denoise(self, x: Tensor, sigma: float, text: Tensor, source: Tensor) -> Tensor:
        return denoise(self.network, self.schedule, x, sigma, text=text, source_latents=source)
