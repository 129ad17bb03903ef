"""Schemes with branches of their own: a weak network, perturbed attention, a negative (layer 1).

The first two add `scale * (full - worse)`. The worse branch also sees both conditions, so that only
the quality of the prediction is pushed. The negative instruction is subtracted instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from ipx2p.diffusion.guidance.branches import FULL, AttentionChange, Branch
from ipx2p.diffusion.guidance.scheme import BranchModifier, Scheme, Term, scheme
from ipx2p.diffusion.schedule import Step
from ipx2p.errors import InputError
from ipx2p.stack import parameter

# Declares a scheme that perturbs attention.
perturbed = partial(
    scheme,
    scales="as in the linear scheme; its own scale is added, and acts at scales of 1 too",
    evaluations=1,
    idle={"scale": 0.0},
    full_at=None,
)


@dataclass(frozen=True)
class WorseBranch(BranchModifier):
    """Adds `strength * (full - worse)` in the steps that start at low < sigma <= high."""

    scale: float = parameter(3.0, 0.0, 100.0)
    low: float = parameter(0.0, 0.0)
    high: float = parameter(math.inf, 0.0)

    @property
    def worse(self) -> Branch:
        raise NotImplementedError

    @property
    def strength(self) -> float:
        return self.scale

    def check(self) -> None:
        self.check_window()

    def term(self, text: Term | None, weight: float, step: Step) -> Term | None:
        inside = self.low < step.sigma <= self.high
        return Term("both", self.strength, FULL, self.worse) if inside else None


@scheme(
    name="autoguidance",
    formula="+ (scale - 1) (full - full of the weak network)",
    paper="arXiv:2406.02507",
    scales="as in the linear scheme; at (1, 1) it is pure autoguidance of strength `scale`",
    evaluations=1,
    idle={"scale": 1.0},
    full_at=None,
    needs=("weak",),
)
class Autoguidance(WorseBranch):
    """Guide by a bad version of the network: a smaller or an earlier one.

    Default: near the authors' best for EDM2-S, 2.1, with a weak network after 1/16 of the training.
    """

    scale: float = parameter(2.0, 0.0, 100.0)

    @property
    def strength(self) -> float:
        return self.scale - 1

    @property
    def worse(self) -> Branch:
        return Branch("weak", network="weak")


@dataclass(frozen=True)
class PerturbedBranch(WorseBranch):
    """A branch made worse in attention layers named "mid", "down.1", "up.2.0", ...

    Several are joined by "/". The beginning of a name selects all layers that start with it.
    """

    layers: str = parameter("mid")
    kind = ""
    sigma = 0.0

    @property
    def attention_layers(self) -> Sequence[str]:
        return tuple(self.layers.split("/"))

    @property
    def worse(self) -> Branch:
        change = AttentionChange(self.kind, self.attention_layers, self.sigma)
        return Branch(f"full, {self.scheme.name}", attention=change)


@perturbed(
    name="pag",
    formula="+ scale (full - full whose self-attention map is the identity)",
    paper="arXiv:2403.17377",
)
class PerturbedAttention(PerturbedBranch):
    """Perturbed-attention guidance. Defaults: the authors' for Stable Diffusion 1.5 with guidance.

    Without other guidance they use 5.
    """

    kind = "identity"


@perturbed(
    name="seg",
    formula="+ scale (full - full whose queries are blurred over the picture)",
    paper="arXiv:2408.00760",
)
class SmoothedEnergy(PerturbedBranch):
    """Smoothed energy guidance: a Gaussian blur of the queries; sigma in tokens, inf is the mean.

    A 512 pixel picture has 8 x 8 tokens in the middle, where a sigma of 4 is nearly the mean.
    """

    sigma: float = parameter(math.inf, 0.01)
    kind = "blur"


@perturbed(
    name="skip_layer",
    formula="+ scale (full - full without the named transformer blocks)",
    paper="Stable Diffusion 3.5's skip-layer guidance; no paper",
)
class SkipLayer(PerturbedBranch):
    """Skip-layer guidance: the worse branch skips transformer blocks.

    Scale and window are those of the published model: the first fifth of the steps, here in sigma
    (timestep 799 of Stable Diffusion's schedule). Which blocks of a U-Net to skip is our choice.
    """

    scale: float = parameter(2.8, 0.0, 100.0)
    low: float = parameter(5.0, 0.0)
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
class PerpendicularNegative(BranchModifier):
    """Perp-Neg: subtract what a negative instruction asks for and the instruction does not.

    The null text stays empty; the negative branch sees the source if the text term does.
    Default: the authors' 1.5.
    """

    strength: float = parameter(1.5, 0.0, 100.0)
    condition = "text"

    def check_base(self, base: Scheme, terms: list[Term]) -> None:
        if all(term.condition != "text" for term in terms):
            raise InputError(
                f"guidance perp_neg needs a push along the instruction, and {base.name} has none: "
                "choose another linear scheme, such as ip2p"
            )

    def term(self, text: Term | None, weight: float, step: Step) -> Term | None:
        factor = -self.strength * weight
        negative = replace(text.plus, name="negative", text="negative")
        across = (text.plus, text.minus)
        return Term("text", factor, negative, text.minus, across) if factor else None
