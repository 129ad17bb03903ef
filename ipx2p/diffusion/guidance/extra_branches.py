"""Schemes that run further branches: a weaker network, perturbed attention, a negative (layer 1).

Each adds `scale * (full - worse)`, where the worse branch sees both conditions too, so that only
the quality of the prediction is pushed; the negative instruction takes away instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ipx2p.diffusion.guidance.branches import FULL, AttentionChange, Branch
from ipx2p.diffusion.guidance.scheme import BranchModifier, Scheme, Term, parameter, scheme
from ipx2p.diffusion.guidance.space import Moment, project_off
from ipx2p.diffusion.schedule import Step
from ipx2p.errors import InputError

WORSE_SCALES = "as in the linear scheme; its own scale is on top, and acts at scales of 1 too"


@dataclass
class WorseBranch(BranchModifier):
    """Adds `push * (full - worse)` in the steps that start at low < sigma <= high."""

    @property
    def worse(self) -> Branch:
        raise NotImplementedError

    @property
    def strength(self) -> float:
        return self.scale

    def check(self) -> None:
        """Raise InputError for a window that holds nothing."""
        if self.low >= self.high:
            raise InputError(
                f"guidance {self.scheme.name}: low {self.low} must be below high "
                f"{self.high}, in sigma"
            )

    def branches(self, text: Term | None, weight: float, step: Step) -> list[Branch]:
        """The full and the worse branch, inside the window."""
        acts = self.strength and self.low < step.sigma <= self.high
        return [FULL, self.worse] if acts else []

    def term(
        self, denoised: dict[Branch, Tensor], text: Term | None, weight: float, moment: Moment
    ) -> Tensor:
        """The push away from the worse prediction."""
        return self.strength * (denoised[FULL] - denoised[self.worse])


@scheme(
    name="autoguidance",
    formula="+ (scale - 1) (full - full of the weak network)",
    paper="arXiv:2406.02507",
    space="any",
    scales="as in the linear scheme; at (1, 1) it is pure autoguidance of strength `scale`",
    evaluations=1,
    plain="autoguidance:scale=1",
    full_at=None,
    needs=("weak",),
)
@dataclass
class Autoguidance(WorseBranch):
    """Guide by a bad version of the network itself: a smaller or an earlier one.

    Default: near the authors' best for EDM2-S, 2.1, with a weak network of 1/16 of the training.
    """

    scale: float = parameter(2.0, 0.0, 100.0)
    low: float = parameter(0.0, 0.0)
    high: float = parameter(math.inf, 0.0)

    @property
    def strength(self) -> float:
        return self.scale - 1

    @property
    def worse(self) -> Branch:
        return Branch("weak", network="weak")


@dataclass
class PerturbedBranch(WorseBranch):
    """A worse branch by a change of attention layers, named "mid", "down.1", "up.2.0", ...

    Several are joined by "/". A beginning stands for all that it begins.
    """

    kind = ""
    sigma = 0.0

    @property
    def attention_layers(self) -> Sequence[str]:
        return tuple(self.layers.split("/"))

    @property
    def worse(self) -> Branch:
        change = AttentionChange(self.kind, self.attention_layers, self.sigma)
        return Branch(f"full, {self.scheme.name}", attention=change)


@scheme(
    name="pag",
    formula="+ scale (full - full whose self-attention map is the identity)",
    paper="arXiv:2403.17377",
    space="any",
    scales=WORSE_SCALES,
    evaluations=1,
    plain="pag:scale=0",
    full_at=None,
)
@dataclass
class PerturbedAttention(PerturbedBranch):
    """Perturbed-attention guidance. Defaults: the authors' for Stable Diffusion 1.5 with guidance.

    They use 5 without any other guidance.
    """

    scale: float = parameter(3.0, 0.0, 100.0)
    layers: str = parameter("mid")
    low: float = parameter(0.0, 0.0)
    high: float = parameter(math.inf, 0.0)
    kind = "identity"


@scheme(
    name="seg",
    formula="+ scale (full - full whose queries are blurred over the picture)",
    paper="arXiv:2408.00760",
    space="any",
    scales=WORSE_SCALES,
    evaluations=1,
    plain="seg:scale=0",
    full_at=None,
)
@dataclass
class SmoothedEnergy(PerturbedBranch):
    """Smoothed energy guidance: a Gaussian blur of the queries; sigma in tokens, inf is the mean.

    The middle of a 512 pixel picture has 8 x 8 tokens, where 4 and more are nearly the mean.
    """

    scale: float = parameter(3.0, 0.0, 100.0)
    sigma: float = parameter(math.inf, 0.01)
    layers: str = parameter("mid")
    low: float = parameter(0.0, 0.0)
    high: float = parameter(math.inf, 0.0)
    kind = "blur"


@scheme(
    name="skip_layer",
    formula="+ scale (full - full without the named transformer blocks)",
    paper="Stable Diffusion 3.5's skip-layer guidance; no paper",
    space="any",
    scales=WORSE_SCALES,
    evaluations=1,
    plain="skip_layer:scale=0",
    full_at=None,
)
@dataclass
class SkipLayer(PerturbedBranch):
    """Skip-layer guidance: the worse branch leaves out transformer blocks.

    Scale and window are those of the published model, the first fifth of the steps, here in sigma
    (timestep 799 of Stable Diffusion's schedule); which blocks of a U-Net to skip is our choice.
    """

    scale: float = parameter(2.8, 0.0, 100.0)
    layers: str = parameter("mid")
    low: float = parameter(5.0, 0.0)
    high: float = parameter(math.inf, 0.0)
    kind = "skip"


@scheme(
    name="perp_neg",
    formula="- strength s_T (N less its part along B), N = negative - image",
    paper="arXiv:2304.04968",
    space="x0",
    scales="as in the linear scheme; guidance_scale multiplies the negative too, also at 1",
    evaluations=1,
    plain="perp_neg:strength=0",
    full_at=None,
    needs=("negative",),
)
@dataclass
class PerpendicularNegative(BranchModifier):
    """Perp-Neg: take away of a negative instruction what the instruction does not ask for.

    The null text stays empty; the negative branch is shown the source where the text term is.
    Default: the authors' 1.5.
    """

    strength: float = parameter(1.5, 0.0, 100.0)
    condition = "text"

    def check_base(self, base: Scheme, terms: list[Term]) -> None:
        """Raise InputError for a linear scheme without a push along the instruction."""
        if all(term.condition != "text" for term in terms):
            raise InputError(
                f"guidance perp_neg needs a push along the instruction, and {base.name} has none: "
                "take another linear scheme, as ip2p"
            )

    def branches(self, text: Term | None, weight: float, step: Step) -> list[Branch]:
        """Both ends of the instruction's term, and the negative one."""
        return [text.plus, text.minus, _negative(text)] if self.strength * weight else []

    def term(
        self, denoised: dict[Branch, Tensor], text: Term | None, weight: float, moment: Moment
    ) -> Tensor:
        """What the negative instruction says across the instruction, taken away."""
        negative = denoised[_negative(text)] - denoised[text.minus]
        along = denoised[text.plus] - denoised[text.minus]
        return -self.strength * weight * project_off(negative, along)


def _negative(text: Term) -> Branch:
    """The negative instruction in the place of the instruction."""
    return replace(text.plus, name="negative", text="negative")
