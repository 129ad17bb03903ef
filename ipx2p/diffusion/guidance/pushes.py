"""Changes of the push of a condition: projections, norms, frequencies, angles (layer 1).

The linear scheme is the anchor plus one push per condition, factor * (plus - minus). In ip2p these
are A = image - null with s_I - 1 and B = full - image with s_T - 1. Each scheme changes a push in
its own space; equal predictions give no push. In a stack, each starts from the push that the one
before it returns.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ipx2p.diffusion.guidance.scheme import Push, PushModifier, on, scheme
from ipx2p.diffusion.guidance.space import Moment, dot, norm, project_off, ratio
from ipx2p.stack import parameter


@scheme(
    name="apg",
    formula="g = d + momentum g_before; g min(1, norm / |g|); its part along D_full times eta",
    paper="arXiv:2410.02416, alg. 1",
    space="x0",
    scales="as in the linear scheme; much higher ones remain usable",
    plain="apg:eta=1,norm=inf,momentum=0",
)
class AdaptiveProjection(PushModifier):
    """Adaptive projected guidance: less over-saturation at high scales.

    Over-saturation is gain along the final prediction, so the pushes of both conditions lose their
    parts along D_full; each has its own momentum and norm. With `joint` the sum of the pushes,
    scales included, is treated as one. The mixed form of HunyuanImage 2.1 is plain guidance for
    `after` steps, which only feed the momentum, and then a push `gain` times as strong: its 3.5,
    then 10, is after=5,gain=3.6,norm=10,momentum=-0.5. Defaults: the authors' for Stable Diffusion
    2.1.
    """

    eta: float = parameter(0.0, 0.0, 1.0)
    norm: float = parameter(7.5, 1e-6)
    momentum: float = parameter(-0.75, -1.0, 1.0)
    after: int = parameter(0, 0, 1000)
    gain: float = parameter(1.0, 0.0, 1000.0)
    joint: bool = parameter(False)
    on: str = on("both")
    needs_full = True

    @property
    def as_factor(self) -> float | None:
        linear = self.eta == 1 and self.norm == math.inf and not self.momentum
        return self.gain if linear and (self.gain == 1 or self.after == 0) else None

    def push(self, push: Push, moment: Moment) -> Push:
        difference = push.difference
        if self.momentum:
            difference = self._with_momentum(push, moment)
        if moment.step.index < self.after:
            return push
        if math.isfinite(self.norm):
            difference = difference * ratio(self.norm, norm(difference)).clamp(max=1.0)
        projected = project_off(difference, push.full, self.eta)
        return push.changed(projected, self.gain * push.factor)

    def _with_momentum(self, push: Push, moment: Moment) -> Tensor:
        # The step last seen, the push it started from and the one it leaves.
        key, index = (self, push.name), moment.step.index
        seen, before, after = moment.memory.get(key, (None, None, None))
        if seen != index:
            before = after
        difference = push.difference if before is None else push.difference + self.momentum * before
        # A second evaluation in a step (Heun) starts from the same push and leaves no trace.
        moment.memory[key] = (index, before, difference if seen != index else after)
        return difference


@scheme(
    name="zero_star",
    formula="plus + (s - 1) (plus - s* minus), s* = <plus, minus> / |minus|^2",
    paper="arXiv:2503.18886; without its zero output at the start, which is for flow models",
    space="v",
    scales="as in the linear scheme",
)
class ZeroStar(PushModifier):
    """CFG-Zero*'s optimised scale: the push loses its part along `minus`."""

    on: str = on("both")

    def push(self, push: Push, moment: Moment) -> Push:
        return push.changed(project_off(push.difference, moment.prediction(push.minus, "v")))


@scheme(
    name="tcfg",
    formula="minus' = cos^2(p) minus + sin(p) cos(p) plus, "
    "p = atan2(2 <minus, plus>, |minus|^2 - |plus|^2) / 2; plus - minus' is pushed",
    paper="arXiv:2503.18137",
    space="eps",
    scales="acts like about 1 + (s - 1) / 2, exactly where both predictions have equal norms",
    relative_strength=0.5,
)
class TangentialDamping(PushModifier):
    """TCFG: the prediction without the condition keeps only what both have in common.

    That is its part along the first singular vector of the pair, in closed form from their 2 x 2
    Gram matrix.
    """

    on: str = on("both")

    def push(self, push: Push, moment: Moment) -> Push:
        """The push from the damped prediction, written so that no digits are lost.

        minus' - minus = ((cos 2p - 1) minus + sin 2p plus) / 2. The weights nearly cancel, and at
        high noise both predictions are nearly x. With their difference d it is
        ((cos 2p + sin 2p - 1) minus + sin 2p d) / 2.
        """
        raw = push.plus - push.minus
        minus, d = moment.prediction(push.minus, "eps"), raw * moment.per_denoised("eps")
        cosine, sine = -dot(d, 2 * minus + d), 2 * dot(minus, minus + d)
        length = torch.hypot(cosine, sine)
        c, s = ratio(cosine, length), ratio(sine, length)
        weight = torch.where(s > 0, c * (1 + s - c) / (1 + s), c + s - 1)
        damped = (weight * (push.minus - moment.x) + s * raw) / 2
        return push.changed(push.difference - damped)


@scheme(
    name="fdg",
    formula="a Laplacian pyramid of the push; its levels times low ... high",
    paper="arXiv:2506.19713",
    scales="as in the linear scheme; low and high multiply the push s - 1, so that at 7.5 the "
    "defaults are about the authors' 5 and 10",
    plain="fdg:low=1,high=1",
)
class FrequencyDecoupled(PushModifier):
    """Frequency-decoupled guidance: coarse structure and fine detail pushed by different amounts.

    Our own pyramid halves a level of any size by averages of 2 x 2 and enlarges it bilinearly.
    """

    low: float = parameter(0.6, -100.0, 100.0)
    high: float = parameter(1.4, -100.0, 100.0)
    levels: int = parameter(2, 2, 8)
    on: str = on("both")

    @property
    def as_factor(self) -> float | None:
        return self.low if self.low == self.high else None

    def push(self, push: Push, moment: Moment) -> Push:
        bands = pyramid(push.difference, self.levels)
        last = max(len(bands) - 1, 1)
        weights = [self.low + (self.high - self.low) * i / last for i in range(len(bands))][::-1]
        result = weights[-1] * bands[-1]
        for band, weight in zip(bands[-2::-1], weights[-2::-1], strict=True):
            result = enlarged(result, band) + weight * band
        return push.changed(result)


def pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """Laplacian pyramid of (B, C, h, w), finest first; fewer levels where x is too small."""
    bands = []
    while len(bands) < levels - 1 and min(x.shape[-2:]) > 1:
        smaller = F.avg_pool2d(x, 2, ceil_mode=True)
        bands.append(x - enlarged(smaller, x))
        x = smaller
    return [*bands, x]


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """x at the size of another feature map."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


@scheme(
    name="mambo_g",
    formula="s' = 1 + (s - 1) exp(-damping |plus - minus| / |minus|)",
    paper="arXiv:2508.03442",
    space="v",
    scales="an upper bound; each condition is damped by its own ratio",
    idle={"damping": 0.0},
)
class MagnitudeAware(PushModifier):
    """Magnitude-aware guidance: hold back if the push is large compared with the prediction."""

    damping: float = parameter(8.0, 0.0, 1000.0)
    on: str = on("both")

    def push(self, push: Push, moment: Moment) -> Push:
        size = norm(push.difference) * abs(moment.per_denoised("v"))
        share = ratio(size, norm(moment.prediction(push.minus, "v")))
        return push.changed(push.difference * torch.exp(-self.damping * share))


@scheme(
    name="power_law",
    formula="plus + (s - 1) (rms(d) / unit)^power d, d in units of the score, eps / s_t",
    paper="arXiv:2502.07849",
    space="eps",
    scales="s - 1 is the paper's omega times (unit sqrt(4 h w))^power: independent of the size",
    idle={"power": 0.0},
)
class PowerLaw(PushModifier):
    """Power-law guidance: a push that fades as the predictions approach each other.

    The paper uses the norm of the score's difference and retunes omega for each resolution. We use
    the root mean square; where it equals `unit`, the push is that of plain guidance. The default is
    our own choice.
    """

    power: float = parameter(0.9, 0.0, 3.0)
    unit: float = parameter(0.1, 1e-6, 1e6)
    joint: bool = parameter(False)
    on: str = on("both")

    def push(self, push: Push, moment: Moment) -> Push:
        s = moment.sigma / math.sqrt(1 + moment.sigma**2)
        rms = norm(push.difference) / math.sqrt(push.difference[0].numel())
        score = rms * abs(moment.per_denoised("eps")) / s
        return push.changed(push.difference * (score / self.unit) ** self.power)


@scheme(
    name="adg",
    formula="t = min((s - 1) angle(plus, minus), cap); "
    "cos(t) plus + sin(t) / sin(angle) (plus - minus, less its part along minus)",
    paper="arXiv:2506.11039",
    space="x0",
    scales="guidance_scale - 1 multiplies the angle, scales below 1 act as 1; "
    "image_guidance_scale stays linear",
)
class AngleDomain(PushModifier):
    """Angle-domain guidance: turn the prediction instead of lengthening it.

    As the authors compute it, which is not an exact rotation: lengths grow by up to 1.3. Since two
    turns do not commute, it acts on the text alone by default.
    """

    cap: float = parameter(60.0, 0.0, 180.0)  # degrees
    on: str = on("text")

    def push(self, push: Push, moment: Moment) -> Push:
        factor = max(push.factor, 0.0)
        lengths = norm(push.plus) * norm(push.minus)
        cosine = ratio(dot(push.plus, push.minus), lengths)
        # The sine comes from the orthogonal part: the arc cosine loses its digits at small angles.
        sine = ratio(norm(project_off(push.plus, push.minus)), norm(push.plus))
        angle = torch.atan2(sine, cosine)
        turn = (factor * angle).clamp(max=math.radians(self.cap))
        across = ratio(turn.sin(), sine) * project_off(push.difference, push.minus)
        return push.changed((turn.cos() - 1) * push.plus + across, factor=1.0)
