"""Scales that change over the steps: limited interval, schedules, CFG++ (layer 1).

They act before the branches are chosen, so a condition at the scale of the full branch costs
nothing in that step.
"""

import math

from ipx2p.diffusion.guidance.scheme import ScaleModifier, Scheme, Term, on, scheme
from ipx2p.diffusion.schedule import Step
from ipx2p.errors import InputError
from ipx2p.stack import parameter

# Push as a function of progress u, 0 at noise and 1 at the picture. The mean is 1
# (arXiv:2404.13040), except that of powered_cosine, which is 1/2 at power 1.
CURVES = {
    "constant": lambda u, power: 1.0,
    "linear": lambda u, power: 2 * u,
    "cosine": lambda u, power: 1 - math.cos(math.pi * u),
    "inverse_linear": lambda u, power: 2 * (1 - u),
    "sine": lambda u, power: 1 + math.cos(math.pi * u),
    "v": lambda u, power: 2 * abs(2 * u - 1),
    "lambda": lambda u, power: 2 * (1 - abs(2 * u - 1)),
    "powered_cosine": lambda u, power: (1 - math.cos(math.pi * u**power)) / 2,
}
LAMBDA_PER_SCALE = 1 / 12.5  # the authors' lambda in [0, 1] acts like a scale in [1, 12.5]


@scheme(
    name="interval",
    formula="s(sigma) = s where low < sigma <= high, else the scale of the full branch",
    paper="arXiv:2404.07724, eq. 5-6",
    scales="as in the linear scheme, inside the interval",
    idle={"low": 0.0, "high": math.inf},
)
class Interval(ScaleModifier):
    """Guidance only in the middle of the run; outside, one branch runs.

    The sigma at the start of a step decides, so both evaluations of Heun agree. An interval of both
    conditions also switches off schemes with branches of their own (pag, ...); two intervals,
    on=text and on=image, leave them running. Defaults: the authors' for SD-XL, which has the noise
    schedule of Stable Diffusion 1.x.
    """

    low: float = parameter(0.28, 0.0)
    high: float = parameter(5.42, 0.0)
    on: str = on("both")
    last = True

    def check(self) -> None:
        self.check_window(" (Stable Diffusion: 0.03 at the picture, 14.6 at noise)")

    def holds(self, step: Step) -> bool:
        return self.low < step.sigma <= self.high

    def scale(self, scale: float, neutral: float, step: Step) -> float:
        return scale if self.holds(step) else neutral


@scheme(
    name="schedule",
    formula="s(u) = 1 + (s - 1) f(u), u from 0 at noise to 1 at the picture; f has mean 1: "
    "linear 2u, cosine 1 - cos(pi u), ...; powered_cosine (1 - cos(pi u^power)) / 2",
    paper="arXiv:2404.13040",
    scales="the mean over many steps (powered_cosine: the last); the curve shapes the push s - 1",
    idle={"curve": "constant"},
)
class ScheduleOverTime(ScaleModifier):
    """Guidance that rises or falls over the steps.

    The paper finds rising curves best, for one condition. It multiplies the scale; we multiply the
    push, so that it falls to the full branch and not to the branch without the condition. Scales
    above `floor` do not fall below it; the paper's are 2 for Stable Diffusion 1.5 and 4 for SD-XL.
    """

    curve: str = parameter("linear", -math.inf, math.inf, *CURVES)
    power: float = parameter(1.0, 0.01, 100.0)
    floor: float | None = parameter(None, 0.0, 1000.0)  # None: scales follow the curve
    on: str = on("both")

    def scale(self, scale: float, neutral: float, step: Step) -> float:
        progress = step.index / (step.count - 1) if step.count > 1 else 0.5
        shaped = neutral + (scale - neutral) * CURVES[self.curve](progress, self.power)
        return shaped if self.floor is None else max(shaped, min(self.floor, scale))


@scheme(
    name="cfgpp",
    formula="s_i = lambda sigma_i / (sigma_i - sigma_down): a step of guidance lambda that is "
    "renoised with the branch without the condition",
    paper="arXiv:2406.08070",
    scales="lambda = guidance_scale / 12.5, unless `lam` is given; image_guidance_scale stays",
    full_at=None,
    samplers=("ddim", "euler", "euler_ancestral"),
)
class CfgPlusPlus(ScaleModifier):
    """CFG++ as a schedule of scales, which is exact for samplers of first order.

    On the text (default) the step is renoised with null + s_I (image - null). Its strength grows
    with the number of steps; the authors use 0.6 for 50. A step to sigma 0 has the scale lambda.
    """

    lam: float | None = parameter(None, 0.0, 10.0)
    on: str = on("text")

    @property
    def replaces(self) -> bool:
        return self.lam is not None

    def check_base(self, base: Scheme, terms: list[Term]) -> None:
        super().check_base(base, terms)
        # With on=both a step is renoised with null, which takes a sum of both pushes.
        if base.name == "nested" and self.on == "both":
            raise InputError(
                "guidance cfgpp:on=both does not go with nested, which multiplies its scales: set "
                "on=image, which covers both there"
            )

    def scale(self, scale: float, neutral: float, step: Step) -> float:
        """The scale of plain guidance that makes the same step; InputError if there is none."""
        if step.sigma_down >= step.sigma:
            raise InputError(
                f"guidance cfgpp: steps {step.index + 1} and {step.index + 2} of {step.count} have "
                "the same noise level: use fewer steps"
            )
        lam = scale * LAMBDA_PER_SCALE if self.lam is None else self.lam
        return lam * step.sigma / (step.sigma - step.sigma_down)
