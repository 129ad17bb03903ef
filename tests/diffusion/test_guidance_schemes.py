"""What every guidance scheme declares about itself, shown; a scheme in the registry is tested here.

Random predictions of the branches stand for the network.
"""

import dataclasses
import math
import re

import pytest
import torch

from ipx2p.diffusion.guidance.branches import FULL, NULL, Branch, Conditions
from ipx2p.diffusion.guidance.denoiser import GuidedDenoiser
from ipx2p.diffusion.guidance.registry import SCHEMES
from ipx2p.diffusion.guidance.scheme import PushModifier, ScaleModifier
from ipx2p.diffusion.samplers import SAMPLERS, make_plan
from ipx2p.diffusion.schedule import Schedule, ScheduleConfig, Step
from ipx2p.errors import InputError
from tests.diffusion.started import Started

LINEAR = [name for name, scheme in SCHEMES.items() if scheme.is_linear]
MODIFIERS = [name for name in SCHEMES if name not in LINEAR]
SHAPE = (2, 4, 3, 5)
SCALES = (7.0, 1.5)
# In the middle of a run, inside the default interval
STEP = Step(index=1, count=5, sigma=2.0, sigma_next=1.2, sigma_down=1.2)
PREDICTIONS = ["epsilon", "v_prediction"]


def guidance(spec, scales=SCALES):
    return Started(spec, *scales)


def different(name):
    """Parameters with which a scheme acts in one step of these predictions."""
    settings = {
        "interval": "low=0,high=1",
        "apg": "norm=0.5",
        "mimic": "scale=1",
        "dynamic_threshold": "bound=0.2",
        "cads": "tau1=0,tau2=0.5",
        "skip_layer": "low=0",
    }
    return f"{name}:{settings[name]}" if name in settings else name


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Network:
    """Answers each branch in its own way, and notes how many rows it was asked for."""

    def __init__(self, shift=0.0, alike=False):
        self.shift, self.alike, self.rows = shift, alike, 0

    def __call__(self, latents, timesteps, text, source, attention_overrides=None, deep=None):
        self.rows += len(latents)
        deep = [] if deep is None else deep
        if not deep:
            deep.append(latents)
        answer = 0.6 * latents
        if not self.alike:
            told = text[:, 0, :4, None, None].float().tanh()  # one number per channel
            answer = answer + told * deep[0].cos() * (1 + 0.3 * source)
            answer = answer + 0.3 * source.roll(1, dims=3) * latents.sin() + self.shift
            for kind, _, rows in (attention_overrides or {}).get("mid", ()):
                change = 0.1 * len(kind) * latents.abs().sqrt()
                answer = torch.where(rows[:, None, None, None], answer + change, answer)
        return answer.to(latents.dtype)


def conditions(count=2, dtype=torch.float32):
    text, null, negative = 3 * random(3, count, 77, 6, seed=1).to(dtype)
    source = random(count, *SHAPE[1:], seed=2)
    return Conditions(
        text=text,
        null_text=null,
        negative_text=negative,
        source_latents=source,
        latents=0.2 * source,
        text_noise=lambda index: random(count, 77, 6, seed=100 + index),
    )


def denoiser(spec, scales=SCALES, *, shown=None, prediction="epsilon", **changes):
    network, weak = Network(**changes), Network(shift=0.2, **changes)
    schedule = Schedule(ScheduleConfig(prediction_type=prediction))
    shown = shown or conditions()
    return GuidedDenoiser(
        network, schedule, guidance(spec, scales), shown, weak=weak, attention_layers=["mid"]
    )


def noisy(count=2):
    return 2.2 * random(*SHAPE, seed=3)[:count]


def run(spec, scales=SCALES, **changes):
    guided = denoiser(spec, scales, **changes)
    if "deepcache" in spec:  # which acts from the second step on
        guided(2 * noisy(), 5.0, Step(0, 5, 5.0, STEP.sigma, STEP.sigma))
    return guided(noisy(), STEP.sigma, STEP)


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_declares_what_it_is(name):
    scheme = SCHEMES[name]
    assert scheme.name == name and re.fullmatch("[a-z_0-9]+", name)
    assert scheme.about.formula and scheme.about.scales
    for told in (
        scheme.about.formula,
        scheme.about.paper,
        f"Space: {scheme.about.space}",
        scheme.about.scales,
    ):
        assert told in scheme.make.__doc__
    for parameter in scheme.parameters.values():
        assert f"{parameter.name}={parameter.default}" in scheme.make.__doc__
    assert re.search(
        rf"evaluations: {scheme.about.evaluations}( more)? per step", scheme.make.__doc__
    )
    assert scheme.about.space in ("any", "x0", "eps", "v")
    assert re.search(r"arXiv:\d{4}\.\d{5}|no paper|none|ComfyUI", scheme.about.paper)
    for parameter in scheme.parameters.values():
        if isinstance(parameter.default, int | float):
            assert parameter.low <= parameter.default <= parameter.high


@pytest.mark.parametrize("name", SCHEMES)
def test_a_stack_written_out_in_full_is_the_same_stack(name):
    written = str(guidance(name).spec)
    assert str(guidance(written).spec) == written


GRID = [
    *((7.0, 1.5), (1.0, 1.0), (0.5, 0.5), (3.0, 3.0)),
    *((0.0, 1.0), (0.0, 1.5), (7.0, 1.0), (2.0, -1.0), (1.0, 0.0)),
]


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_scheme_is_plain_dual_guidance_where_it_says_so_and_nowhere_else(name):
    scheme = SCHEMES[name]
    for s_T, s_I in GRID:
        known = {"s_T": s_T, "s_I": s_I}
        declared = scheme.about.plain is not None and eval(
            scheme.about.plain_at or "True", known.copy()
        )
        spec = re.sub(
            "=([^,]+)", lambda m, k=known: f"={eval(m[1], k.copy())}", scheme.about.plain or name
        )
        difference = run(spec, (s_T, s_I)) - run("ip2p", (s_T, s_I))
        assert (difference.abs().max() < 1e-4) == declared, (s_T, s_I)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", MODIFIERS)
def test_a_modifier_equals_the_linear_scheme_where_it_says_so(name, prediction):
    plain = SCHEMES[name].about.plain
    for base in ("ip2p", "text_first", "joint", "full:joint_scale=3"):
        expected = run(base, prediction=prediction)
        if plain is not None:
            close(run(f"{base}+{plain}", prediction=prediction), expected)
    # At its defaults it is something else.
    changed = run(f"ip2p+{different(name)}", prediction=prediction)
    assert (changed - run("ip2p", prediction=prediction)).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEMES)
def test_scales_that_give_the_full_branch_are_those_declared(name, prediction):
    full = run("free", prediction=prediction)
    declared = SCHEMES[name].full_at
    spec = name if name in LINEAR else f"ip2p+{different(name)}"
    if name == "cads":  # which changes what the full branch is shown
        full = run(f"free+{different('cads')}", prediction=prediction)
    if declared is not None:
        close(run(spec, declared, prediction=prediction), full)
        assert run_count(spec, declared) == 1
    elif name != "free":
        for scales in ((1.0, 1.0), (0.5, 0.5), SCALES):
            assert (run(spec, scales, prediction=prediction) - full).abs().max() > 1e-3


def run_count(spec, scales=SCALES):
    guided = denoiser(spec, scales)
    guided(noisy(), STEP.sigma, STEP)
    rows = guided.network.rows + guided.weak.rows
    assert rows == guided.evaluations * SHAPE[0]
    return guided.evaluations


@pytest.mark.parametrize("name", SCHEMES)
def test_evaluations_are_those_declared(name):
    scheme = SCHEMES[name]
    expected = scheme.about.evaluations + scheme.about.evaluations_once
    for base in ("ip2p", "text_only", "full:joint_scale=3"):
        if name in LINEAR:
            assert run_count(name) == expected
        else:
            spec = different(name) if name == "skip_layer" else name  # it guides the first steps
            assert run_count(f"{base}+{spec}") == run_count(base) + expected


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEMES)
def test_equal_predictions_come_out_finite_and_unchanged_unless_declared(name, prediction):
    got = run(different(name) if name == "skip_layer" else name, prediction=prediction, alike=True)
    assert got.isfinite().all()
    expected = run("free", prediction=prediction, alike=True)
    if SCHEMES[name].about.keeps_equal:
        close(got, expected)
    else:
        changed = run(different(name), prediction=prediction, alike=True)
        assert (changed - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODIFIERS)
def test_predictions_of_zero_come_out_finite(name):
    moment = (torch.zeros(SHAPE), 2.0, STEP)
    stack = guidance(name)
    predictions = {branch: torch.zeros(SHAPE) for branch in stack.branches(STEP)}
    assert stack.blend(predictions, *moment).isfinite().all()


def sampled(spec, count, places, sampler="euler", dtype=torch.float32):
    """A run of four steps of the samples at these places of a batch of `count`."""
    shown = conditions(count, dtype)
    parts = {
        field.name: getattr(shown, field.name)[places]
        for field in dataclasses.fields(shown)
        if field.name != "text_noise"
    }
    noise = shown.text_noise
    parts["text_noise"] = lambda index: noise(index)[places]
    guided = denoiser(spec, (3.0, 1.5), shown=Conditions(**parts))
    plan = make_plan(Schedule(), sampler, "trailing", 4)
    x = random(count, *SHAPE[1:], seed=5)[places] * plan.start_factor
    return SAMPLERS[sampler](guided, x, plan, lambda i: random(count, *SHAPE[1:], seed=i)[places])


@pytest.mark.parametrize(
    "spec", [*map(different, SCHEMES), "apg:joint=true", "power_law:joint=true", "apg+fdg+rescale"]
)
def test_a_batch_equals_single_runs_with_the_state_of_each(spec):
    for sampler in SCHEMES[spec.partition(":")[0].partition("+")[0]].samplers or ("euler", "heun"):
        together = sampled(spec, 3, [0, 1, 2], sampler)
        for place in range(3):
            alone = sampled(spec, 3, [place], sampler)[0]
            assert (alone - together[place]).abs().max() <= 1e-4 * alone.std()


@pytest.mark.parametrize("name", SCHEMES)
def test_bfloat16_predictions_are_guided_in_float32(name):
    spec = different(name) if name == "skip_layer" else name
    got = run(spec, shown=conditions(dtype=torch.bfloat16))
    assert got.dtype == torch.float32 and got.isfinite().all()
    if name not in ("mask", "power_law"):  # a threshold, a power: small causes, large effects
        error = (got - run(spec)).abs().mean() / run(spec).std()
        assert error < 0.1


PUSHES, OVER_TIME = (
    [name for name in MODIFIERS if issubclass(SCHEMES[name].make, kind)]
    for kind in (PushModifier, ScaleModifier)
)
# Why a modifier, with the condition that it acts on by default, is refused on a linear scheme.
REFUSED = {
    **{("composable", name): "does not start from" for name in PUSHES},
    **{(base, name): "never gives" for base in ("composable", "free") for name in OVER_TIME},
    ("image_only", "adg"): "on=text would change nothing: image_only .* set on=image",
    ("image_only", "cfgpp"): "on=text would change nothing: image_only .* set on=image",
    ("free", "adg"): "on=text would change nothing: free .* set on=both",
    ("image_only", "perp_neg"): "needs a push along the instruction, and image_only has none",
    ("free", "perp_neg"): "needs a push along the instruction, and free has none",
}


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_modifier_runs_on_every_linear_scheme_or_says_why_not(name):
    for base in LINEAR:
        if (base, name) in REFUSED:
            with pytest.raises(InputError, match=REFUSED[base, name]) as error:
                guidance(f"{base}+{name}")
            assert "\n" not in str(error.value)
        else:
            assert run(f"{base}+{name}").isfinite().all()


@pytest.mark.parametrize(
    "spec", ["joint+fdg:on=image", "text_only+apg:on=image", "joint+schedule:on=image"]
)
def test_a_modifier_that_would_change_nothing_is_refused(spec):
    with pytest.raises(InputError, match=r"on=image would change nothing: .* set on=text$"):
        guidance(spec)


def test_a_lambda_has_to_come_before_the_scales_that_it_sets():
    with pytest.raises(
        InputError, match="schedule has no effect before cfgpp, which overrides its"
    ):
        guidance("schedule+cfgpp:lam=0.6")
    guidance("cfgpp:lam=0.6+schedule")
    guidance("schedule+cfgpp")
    guidance("schedule:on=image+cfgpp:lam=0.6")


def test_the_weight_of_a_negative_is_that_of_the_instruction():
    """In nested it is s_T s_I, and nested is ip2p at these scales."""
    close(run("nested+perp_neg", (4.0, 1.5)), run("ip2p+perp_neg", (6.0, 1.5)))
    assert run_count("perp_neg", (0.0, 1.5)) == run_count("ip2p", (0.0, 1.5))


def test_the_lower_scale_that_is_mimicked_is_the_joint_one_too():
    close(
        run("full:joint_scale=7+mimic:scale=2,image_scale=2", (7.0, 7.0)),
        run("joint+mimic:scale=2"),
    )


def test_tcfg_keeps_its_digits_at_the_noise_of_zero_snr():
    sigma = 4096.0
    x = sigma * random(*SHAPE, seed=3).double()
    step = Step(0, 2, sigma, 2.0, 2.0)
    clean = random(2, *SHAPE, seed=4).double()
    denoised = dict(zip((FULL, NULL), (clean[0], clean[0] + 0.01 * clean[1]), strict=True))
    exact, got = (
        guidance("joint+tcfg").blend(
            {branch: d.to(dtype) for branch, d in denoised.items()}, x.to(dtype), sigma, step
        )
        for dtype in (torch.float64, torch.float32)
    )
    push = (exact - denoised[FULL]).abs().mean()
    assert (got - exact).abs().max() < 1e-3 * push


def test_a_picture_of_one_row_has_no_detail_to_push():
    d_c, d_u = random(2, 2, 4, 1, 5)
    got, plain = (
        guidance(spec).blend({FULL: d_c, NULL: d_u}, d_c, 2.0, STEP)
        for spec in ("joint+fdg:low=0.5,high=3", "joint")
    )
    close(got - d_c, 0.5 * (plain - d_c))


def test_cfgpp_refuses_steps_between_equal_noise_levels():
    plan = make_plan(Schedule(), "ddim", "trailing", 1000)
    with pytest.raises(InputError, match=r"cfgpp: steps \d+ and \d+ of 1000 have the same noise"):
        guidance("cfgpp").check_plan(plan)
    guidance("cfgpp").check_plan(make_plan(Schedule(), "ddim", "trailing", 100))


def test_parts_of_a_stack_stand_in_any_order_around_the_linear_scheme():
    stacked = run("apg:eta=0,norm=0.5+text_first+interval:low=0.28,high=5.4+rescale:phi=0.7")
    close(stacked, run("text_first + apg:norm=0.5 + rescale + interval:high=5.4"))
    assert guidance("rescale").base.name == "ip2p"


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "ddpm"])
def test_samplers_that_cannot_couple_are_refused(sampler):
    with pytest.raises(InputError, match=f"cfgpp does not work with the sampler {sampler}: choose"):
        guidance("apg+cfgpp").check_sampler(sampler)
    guidance("apg").check_sampler(sampler)


def test_infinity_may_have_a_sign():
    assert guidance("interval:low=0,high=+inf+apg:norm=+inf").modifiers[0].high == math.inf


def test_outside_an_interval_one_branch_runs():
    stack = guidance("apg+interval:low=1,high=3+rescale")
    for sigma, names in ((1.0, ["full"]), (1.1, ["full", "image", "null"]), (3.1, ["full"])):
        step = Step(0, 2, sigma, 0.5, 0.5)
        assert [branch.name for branch in stack.branches(step)] == names


def test_outside_an_interval_a_scheme_has_its_own_scales_of_the_full_branch():
    for base in ("symmetric", "full:joint_scale=3", "nested", "text_first"):
        stack = guidance(f"{base}+interval:high=1,low=0")
        assert [branch.name for branch in stack.branches(STEP)] == ["full"]


def test_a_mask_is_found_with_the_clean_instruction():
    masks = [denoiser(spec) for spec in ("mask", "mask+cads:tau1=0,tau2=0.1")]
    for guided in masks:
        guided(noisy(), STEP.sigma, STEP)
    assert torch.equal(masks[0].mask, masks[1].mask)


def test_an_interval_is_decided_by_the_start_of_the_step():
    guided = denoiser("interval:low=1,high=3")
    guided(noisy(), 0.5, STEP)
    assert guided.evaluations == 3


def test_conditions_have_intervals_of_their_own():
    stack = guidance("interval:low=1,high=15,on=image+interval:low=0,high=3,on=text")
    counts = [len(stack.branches(Step(0, 2, s, 0.1, 0.1))) for s in (10.0, 2.0, 0.5)]
    # source alone: full, image, null; both; instruction alone: full, image
    assert counts == [3, 3, 2]
    assert stack.scales_at(Step(0, 2, 10.0, 1, 1)) == {"text": 1.0, "image": 1.5}


def test_outside_an_interval_no_branch_of_another_scheme_runs():
    names = "autoguidance+pag+seg+skip_layer:low=0+perp_neg"
    outside, inside = (Step(0, 2, sigma, 0.5, 0.5) for sigma in (6.0, 2.0))
    both = guidance(f"{names}+interval")
    assert [branch.name for branch in both.branches(outside)] == ["full"]
    assert len(both.branches(inside)) == 3 + 5
    full = random(*SHAPE)
    assert torch.equal(both.blend({Branch("full"): full}, full, 6.0, outside), full)
    # A negative instruction belongs to the text, the others to both conditions.
    text = guidance(f"{names}+interval:on=text")
    assert len(text.branches(outside)) == 3 + 4
    apart = guidance("pag+interval:on=text+interval:on=image")
    assert len(apart.branches(outside)) == 2


@pytest.mark.parametrize("name", LINEAR)
def test_scales_that_a_scheme_does_not_use_change_nothing(name):
    for place, condition in enumerate(("text", "image")):
        other = [*SCALES]
        other[place] += 1.3
        same = torch.equal(run(name), run(name, tuple(other)))
        assert same == (condition in guidance(name).unused_scales)


def test_a_run_of_one_step_is_in_the_middle_of_a_schedule():
    once = Step(0, 1, 2.0, 0.0, 0.0)
    assert guidance("schedule:curve=lambda").scales_at(once) == {"text": 13.0, "image": 2.0}
    assert guidance("schedule:curve=linear").scales_at(once) == {"text": 7.0, "image": 1.5}


def test_use_of_a_scale_does_not_depend_on_the_other_one():
    assert guidance("nested+interval:on=image", (3.0, 0.0)).unused_scales == []
    assert guidance("cfgpp:lam=0.6").unused_scales == ["text"]
    assert guidance("cfgpp").unused_scales == []
    assert guidance("cfgpp:lam=0.6,on=both").unused_scales == ["text", "image"]


def test_outside_an_interval_a_lower_scale_is_not_mimicked():
    outside = Step(0, 2, 6.0, 0.5, 0.5)
    stack = guidance("mimic:scale=1,image_scale=1+interval")
    assert [branch.name for branch in stack.branches(outside)] == ["full"]


def test_a_schedule_goes_where_its_curve_goes_unless_it_has_a_floor():
    ends = [Step(index, 3, 2.0, 1.0, 1.0) for index in (0, 2)]
    for scale in (0.25, -2.0, 7.0):
        got = [guidance("schedule", (scale, 1.5)).scales_at(step)["text"] for step in ends]
        assert got == [1.0, 1 + 2 * (scale - 1)]
    floored = guidance("schedule:curve=inverse_linear,floor=2")
    assert [floored.scales_at(step) for step in ends] == [
        *({"text": 13.0, "image": 2.0}, {"text": 2.0, "image": 1.5})
    ]


def test_attention_layers_are_found_by_the_beginnings_of_their_names():
    guided = denoiser("pag:layers=up.1/mid")
    guided.attention_layers = ["mid", "up.1.0", "up.1.1", "up.10.0"]
    branch = next(b for b in guided.spec.plan(STEP).branches if b.attention)
    edits = guided._attention_overrides([Branch("full"), branch], 2, torch.device("cpu"))
    assert [*edits] == ["up.1.0", "up.1.1", "mid"]
    kind, _, rows = edits["mid"][0]
    assert kind == "identity" and rows.tolist() == [False, False, True, True]
    guided.attention_layers = ["mid", "up.2.0"]
    with pytest.raises(InputError, match="no attention layer 'up.1'; it has mid, up.2.0"):
        guided(noisy(), STEP.sigma, STEP)


def test_extreme_scales_and_damping_stay_finite():
    assert run("apg:norm=inf,eta=0.5", (1000.0, 3.0)).isfinite().all()
    assert not math.isnan(run("mambo_g:damping=1000").sum())


def test_every_step_whole_is_the_same_computation():
    for sampler in ("euler", "heun"):
        one, plain = (
            sampled(f"pag+{spec}", 2, [0, 1], sampler) for spec in ("deepcache:every=1", "ip2p")
        )
        assert torch.equal(one, plain)
    specs = [guidance(spec).canonical for spec in ("deepcache:every=1", "ip2p", "deepcache")]
    assert specs[0] == specs[1] != specs[2]
    assert guidance("deepcache").effective_scales is None


def kept_by(spec, sampler, batch_branches, steps=7):
    """Steps of a run, each with what its calls saw: whole or not, and for each row the latents,
    the condition, and both as they were when its deep feature was made."""
    seen = [[] for _ in range(steps)]

    def network(latents, timesteps, text, source, deep):
        is_whole = not deep
        rows = torch.cat([part.flatten(1) for part in (latents, text, source)], dim=1)
        if is_whole:
            deep.append(rows)
        assert deep[0].shape == rows.shape
        seen[now.index] += [(is_whole, *pair) for pair in zip(rows, deep[0], strict=True)]
        return 0.6 * latents + 0.1 * source * text[:, :1, :1, None]

    shown = conditions()
    guided = GuidedDenoiser(
        network, Schedule(), guidance(spec).spec, shown, batch_branches=batch_branches,
        shallow_share=lambda h, w: (h + w) / 100,
    )  # fmt: skip

    def noting(x, sigma, step):
        nonlocal now
        now = step
        return guided(x, sigma, step)

    now = None
    plan = make_plan(Schedule(), sampler, "karras", steps)
    SAMPLERS[sampler](noting, plan.start_factor * random(*SHAPE, seed=5), plan, None)
    return seen, guided


@pytest.mark.parametrize("batch_branches", [True, False])
@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 1), ("heun", 2)])
def test_a_step_that_is_not_whole_keeps_the_features_of_the_last_whole_one(
    sampler, evaluations, batch_branches
):
    seen, guided = kept_by("deepcache:every=3", sampler, batch_branches)
    last = {}
    size = math.prod(SHAPE[1:])
    for index, calls in enumerate(seen):
        assert len(calls) == 3 * SHAPE[0] * (evaluations if index < 6 else 1)
        for is_whole, row, kept in calls:
            assert is_whole == (index in (0, 3, 6))
            condition = row[size:].numpy().tobytes()
            if is_whole:
                last[condition] = row
            assert torch.equal(kept, last[condition])
    # of 3 branches; the share is that of 3 x 5 latents
    whole, shallow = (2 * evaluations + 1, 4 * evaluations)
    assert guided.evaluations == pytest.approx(3 * (whole + 0.08 * shallow))


@pytest.mark.parametrize("batch_branches", [True, False])
def test_a_branch_without_a_deep_feature_of_its_own_runs_whole(batch_branches):
    spec = "deepcache:every=4+interval:low=0.3,high=3"
    seen, _ = kept_by(spec, "euler", batch_branches, steps=8)
    counts = [(len(calls), sum(whole for whole, *_ in calls)) for calls in seen]
    few, many = SHAPE[0], 3 * SHAPE[0]
    start = next(i for i, (rows, _) in enumerate(counts) if rows == many)
    assert start in (1, 2, 3)  # where only `full` has one
    expected = [(few, few if i in (0, 4) else 0) for i in range(8)]
    for i, (rows, _) in enumerate(counts):
        if rows == many:
            expected[i] = (many, many if i == 4 else many - few if i == start else 0)
    assert counts == expected


def test_a_mask_is_found_by_the_whole_network():
    guided = denoiser("mask+deepcache:every=2")
    guided(noisy(), STEP.sigma, STEP)
    assert guided.evaluations == 2 + 3
