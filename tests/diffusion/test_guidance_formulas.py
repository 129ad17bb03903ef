"""Guidance schemes against their papers' formulas, written out here in float64.

One condition: d_c is the full branch, d_u the null branch of `joint`, w is guidance_scale. With two
conditions, e00, eI0 and eIT are the null, image and full branches of `ip2p`.
"""

import math

import pytest
import torch

from ipx2p.diffusion.guidance.branches import FULL, IMAGE, NULL, Branch, Conditions
from ipx2p.diffusion.guidance.conditions import ConditionAnnealing, RelevanceMask
from ipx2p.diffusion.guidance.denoiser import GuidedDenoiser
from ipx2p.diffusion.samplers import SAMPLERS, make_plan
from ipx2p.diffusion.schedule import Schedule, Step
from tests.diffusion.started import Started

SIGMA = 1.7
ALPHA = 1 / math.sqrt(1 + SIGMA**2)
S = SIGMA * ALPHA
SHAPE = (3, 4, 6, 5)
W = 6.0


def step(index=1, sigma=SIGMA):
    return Step(index, 4, sigma, sigma / 2, sigma / 2)


def random(seed, *shape):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or SHAPE), generator=source, dtype=torch.float64)


X = 2 * random(0)
D_C = random(1)
D_U = D_C + 0.3 * random(2)


def stack(spec, guidance_scale=W, image_guidance_scale=1.5):
    return Started(spec, guidance_scale, image_guidance_scale)


def guided(spec, scale=W):
    """Both predictions, denoised, through `joint` and the scheme."""
    return stack(f"joint+{spec}", scale).blend({FULL: D_C, NULL: D_U}, X, SIGMA, step())


def eps(denoised):
    return (X - denoised) / SIGMA


def v(denoised):
    return ALPHA * eps(denoised) - S * denoised


def denoised_of_v(v):
    return ALPHA * (ALPHA * X) - S * v


def each(function, *tensors):
    """A formula for one sample, applied to each."""
    return torch.stack([function(*parts) for parts in zip(*tensors, strict=True)])


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_velocity_is_that_of_the_schedule():
    close(denoised_of_v(v(D_C)), D_C)


def test_rescale_brings_the_spread_of_v_back():
    def formula(c, u):
        g = u + W * (c - u)
        return 0.7 * g * c.std() / g.std() + 0.3 * g

    close(guided("rescale"), denoised_of_v(each(formula, v(D_C), v(D_U))))


def test_apg_clips_projects_and_remembers():
    beta, radius, eta = -0.5, 4.0, 0.2
    apg = stack(f"joint+apg:eta={eta},norm={radius},momentum={beta}", W)
    kept = torch.zeros(SHAPE, dtype=torch.float64)
    for index in range(3):
        c, u = random(10 + index), random(20 + index)
        kept = c - u + beta * kept

        def formula(c, g):
            g = g * min(1.0, radius / g.norm().item())
            unit = c / c.norm()
            along = (g * unit).sum() * unit
            return c + (W - 1) * (g - along + eta * along)

        got = apg.blend({FULL: c, NULL: u}, X, SIGMA, step(index))
        close(got, each(formula, c, kept))
        # The second evaluation of a step shares its momentum and leaves no trace.
        apg.blend({FULL: u, NULL: c}, X, SIGMA / 2, step(index))


def test_apg_cleans_both_conditions_against_the_full_prediction():
    e00, eI0, eIT = random(1), random(2), random(3)
    got = stack("apg:norm=3,momentum=0").blend({FULL: eIT, IMAGE: eI0, NULL: e00}, X, SIGMA, step())

    def clean(g, full):
        g = g * min(1.0, 3 / g.norm().item())
        return g - (g * full).sum() / (full * full).sum() * full

    pushes = 0.5 * each(clean, eI0 - e00, eIT) + (W - 1) * each(clean, eIT - eI0, eIT)
    close(got, eIT + pushes)
    # Joint: once, on the sum of the pushes.
    joint = stack("apg:norm=3,momentum=0,joint=true").blend(
        {FULL: eIT, IMAGE: eI0, NULL: e00}, X, SIGMA, step()
    )
    total = 0.5 * (eI0 - e00) + (W - 1) * (eIT - eI0)
    close(joint, eIT + each(clean, total, eIT))


def test_every_push_has_a_momentum_of_its_own():
    e00, eI0, eIT = random(1), random(2), random(3)
    spec = "free:null=-0.5,image=-3+apg:eta=1,norm=inf,momentum=-0.5"
    predictions = {FULL: eIT, IMAGE: eI0, NULL: e00}
    scheme = stack(spec)
    scheme.blend(predictions, X, SIGMA, step(0))
    got = scheme.blend(predictions, X, SIGMA, step(1))
    close(got, eIT + 0.5 * (0.5 * (eIT - e00) + 3 * (eIT - eI0)))


def test_apg_after_some_steps_starts_plain_with_its_momentum_fed():
    mixed = stack("joint+apg:after=1,norm=inf,eta=1,momentum=-0.5", W)
    first = mixed.blend({FULL: D_C, NULL: D_U}, X, SIGMA, step(0))
    close(first, D_U + W * (D_C - D_U))
    second = mixed.blend({FULL: D_C, NULL: D_U}, X, SIGMA, step(1))
    close(second, D_C + (W - 1) * 0.5 * (D_C - D_U))


def test_apg_in_its_mixed_form_pushes_by_a_gain_of_its_own():
    """3.5, then APG at 10: the push 9 is 3.6 times the push 2.5."""
    mixed = stack("joint+apg:after=1,gain=3.6,norm=2,momentum=0", 3.5)
    first = mixed.blend({FULL: D_C, NULL: D_U}, X, SIGMA, step(0))
    close(first, D_U + 3.5 * (D_C - D_U))

    def formula(c, u):
        g = (c - u) * min(1.0, 2 / (c - u).norm().item())
        return c + 9 * (g - (g * c).sum() / (c * c).sum() * c)

    second = mixed.blend({FULL: D_C, NULL: D_U}, X, SIGMA, step(1))
    close(second, each(formula, D_C, D_U))


def test_zero_star_scales_the_prediction_without_the_condition():
    def formula(c, u):
        scale = (c * u).sum() / (u.norm() ** 2 + 1e-8)
        return scale * u + W * (c - scale * u)

    expected = denoised_of_v(each(formula, v(D_C), v(D_U)))
    torch.testing.assert_close(guided("zero_star"), expected, rtol=1e-7, atol=1e-7)


def test_tcfg_is_a_projection_on_the_first_singular_vector():
    def formula(c, u):
        _, _, rows = torch.linalg.svd(torch.stack([u.flatten(), c.flatten()]), full_matrices=False)
        damped = ((u.flatten() @ rows[0]) * rows[0]).view_as(u)
        return damped + W * (c - damped)

    close(guided("tcfg"), X - SIGMA * each(formula, eps(D_C), eps(D_U)))


def test_tcfg_halves_the_push_of_predictions_of_equal_norm():
    c, u = (e / e.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for e in (eps(D_C), eps(D_U)))
    got = stack("joint+tcfg").blend({FULL: X - SIGMA * c, NULL: X - SIGMA * u}, X, SIGMA, step())
    close(got, X - SIGMA * (u + (1 + (W - 1) / 2) * (c - u)))


def test_fdg_weighs_coarse_and_fine():
    flat = torch.ones(1, 4, 6, 8, dtype=torch.float64)
    checks = (torch.arange(6)[:, None] + torch.arange(8)) % 2 * 2.0 - 1 + 0 * flat
    fdg = stack("joint+fdg:low=0.5,high=3")
    for difference, weight in ((flat, 0.5), (checks, 3.0), (flat + checks, None)):
        d_c = random(4, 1, 4, 6, 8)
        got = fdg.blend({FULL: d_c, NULL: d_c - difference}, d_c, SIGMA, step())
        expected = 0.5 * flat + 3 * checks if weight is None else weight * difference
        close(got, d_c + (W - 1) * expected)


def test_fdg_of_three_levels_is_three_bands_of_the_push():
    d_c, d = random(4, 1, 4, 8, 12), random(5, 1, 4, 8, 12)

    def halved(x):
        return (x[..., 0::2, :] + x[..., 1::2, :])[..., 0::2] / 4 + (
            x[..., 0::2, :] + x[..., 1::2, :]
        )[..., 1::2] / 4

    def doubled(x):
        return torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")

    fine, middle = d - doubled(halved(d)), halved(d) - doubled(halved(halved(d)))
    coarse = halved(halved(d))
    got = stack("joint+fdg:low=0.5,high=3,levels=3").blend(
        {FULL: d_c, NULL: d_c - d}, d_c, SIGMA, step()
    )
    close(got, d_c + (W - 1) * (3 * fine + doubled(1.75 * middle + doubled(0.5 * coarse))))


def test_mambo_g_damps_by_the_ratio_of_velocities():
    def formula(c, u):
        weight = 1 + (W - 1) * math.exp(-8 * (c - u).norm() / u.norm())
        return u + weight * (c - u)

    close(guided("mambo_g"), denoised_of_v(each(formula, v(D_C), v(D_U))))


def test_power_law_is_that_of_the_score():
    omega = (W - 1) / (0.1 * math.sqrt(D_C[0].numel())) ** 0.9

    def formula(c, u):  # scores, -eps / s
        return c + omega * (c - u).norm() ** 0.9 * (c - u)

    score = each(formula, -eps(D_C) / S, -eps(D_U) / S)
    close(guided("power_law"), X + SIGMA * S * score)


@pytest.mark.parametrize("scale", [1.0, 2.0, 6.0])
def test_adg_turns_as_its_authors_do(scale):
    def formula(c, u):
        angle = torch.acos((c * u).sum() / (c.norm() * u.norm()))
        turn = min((scale - 1) * angle.item(), math.pi / 3)
        delta = c - u
        across = delta - (delta * u).sum() / (u * u).sum() * u
        return math.cos(turn) * c + math.sin(turn) / angle.sin() * across

    close(guided("adg", scale), each(formula, D_C, D_U))


def test_adg_leaves_the_image_push_linear():
    e00, eI0, eIT = random(1), random(2), random(3)
    predictions = {FULL: eIT, IMAGE: eI0, NULL: e00}
    got = stack("adg").blend(predictions, X, SIGMA, step())
    alone = stack("text_only+adg").blend({FULL: eIT, IMAGE: eI0}, X, SIGMA, step())
    close(got, alone + 0.5 * (eI0 - e00))


def test_dynamic_threshold_is_the_paper_s_at_the_range_of_pixels():
    def formula(c, u):
        g = u + W * (c - u)
        reach = max(g.abs().quantile(0.9).item(), 1.0)
        return g.clamp(-reach, reach) / reach

    close(guided("dynamic_threshold:quantile=0.9,bound=1"), each(formula, D_C, D_U))


def test_mimic_takes_the_range_of_a_lower_scale():
    def formula(c, u):
        g, m = u + W * (c - u), u + 2 * (c - u)
        channels = []
        for gain, mimicked in zip(g, m, strict=True):
            mean, centred = gain.mean(), gain - gain.mean()
            most = (mimicked - mimicked.mean()).abs().max()
            reach = max(most, centred.abs().quantile(0.95))
            channels.append(centred.clamp(-reach, reach) / reach * most + mean)
        return torch.stack(channels)

    close(guided("mimic:scale=2,quantile=0.95"), each(formula, D_C, D_U))


def test_autoguidance_and_perturbed_branches_push_away_from_the_worse():
    e00, eI0, eIT, bad = (random(seed) for seed in range(4))
    plain = e00 + 1.5 * (eI0 - e00) + W * (eIT - eI0)
    for spec, strength in (
        ("autoguidance:scale=3", 2),
        ("pag:scale=3", 3),
        ("seg:scale=3", 3),
        ("skip_layer:scale=3,low=0", 3),
    ):
        scheme = stack(spec)
        *_, worse = scheme.branches(step())
        predictions = {FULL: eIT, IMAGE: eI0, NULL: e00, worse: bad}
        close(scheme.blend(predictions, X, SIGMA, step()), plain + strength * (eIT - bad))


def test_perp_neg_takes_away_what_the_instruction_does_not_ask_for():
    e00, eI0, eIT, eIN = (random(seed) for seed in range(4))

    def across(n, b):
        return n - (n * b).sum() / (b * b).sum() * b

    negative = Branch("negative", text="negative")
    predictions = {FULL: eIT, IMAGE: eI0, NULL: e00, negative: eIN}
    for scale in (W, 1.0):
        got = stack("perp_neg", scale).blend(predictions, X, SIGMA, step())
        taken = 1.5 * each(across, eIN - eI0, eIT - eI0)
        close(got, e00 + 1.5 * (eI0 - e00) + scale * (eIT - eI0 - taken))


@pytest.mark.parametrize(
    ("curve", "pushes"),
    [
        ("linear", [0, 0.5, 1, 1.5, 2]),
        ("inverse_linear", [2, 1.5, 1, 0.5, 0]),
        ("cosine", [0, 1 - 0.5**0.5, 1, 1 + 0.5**0.5, 2]),
        ("sine", [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0]),
        ("v", [2, 1, 0, 1, 2]),
        ("lambda", [0, 1, 2, 1, 0]),
        ("powered_cosine,power=1", [0, (1 - 0.5**0.5) / 2, 0.5, (1 + 0.5**0.5) / 2, 1]),
        ("powered_cosine,power=2", [(1 - math.cos(math.pi * u * u)) / 2 for u in (0, 0.25, 0.5)]),
        ("constant", [1, 1, 1, 1, 1]),
    ],
)
def test_schedules_shape_the_push(curve, pushes):
    scheme = stack(f"schedule:curve={curve},on=text", 7.0)
    for index, push in enumerate(pushes):
        scales = scheme.scales_at(Step(index, 5, 1.0, 0.5, 0.5))
        assert scales == {"text": pytest.approx(1 + 6 * push), "image": 1.5}
    floor = stack("schedule:curve=linear,floor=2", 7.0)
    assert floor.scales_at(Step(0, 5, 1.0, 0.5, 0.5)) == {"text": 2.0, "image": 1.5}


def linear_network(x, source, text):
    """A denoiser of three branches, float64."""
    return 0.5 * x.tanh() + text * x.sin() + source * x.cos()


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral"])
@pytest.mark.parametrize("on", ["text", "both"])
def test_cfgpp_renoises_with_what_lacks_the_condition(sampler, on):
    """arXiv:2406.08070: x0 of the guided prediction, noise of the other."""
    lam, scale = 0.6, 1.0 if on == "both" else 1.5
    plan = make_plan(Schedule(), sampler, "trailing", 5)
    noises = [random(50 + index) for index in range(5)]
    scheme = stack(f"cfgpp:lam={lam},on={on}", 7.0, scale)

    def branches(x):
        shown = ((FULL, 0.2, 0.3), (IMAGE, 0.2, 0.0), (NULL, 0.0, 0.0))
        return {branch: linear_network(x, source, text) for branch, source, text in shown}

    got = SAMPLERS[sampler](
        lambda x, sigma, step: scheme.blend(branches(x), x, sigma, step),
        X * plan.start_factor,
        plan,
        noises.__getitem__,
    )
    x = X * plan.start_factor
    for at in plan:
        d = branches(x)
        without = d[NULL] + scale * (d[IMAGE] - d[NULL]) if on == "text" else d[NULL]
        with_both = d[FULL] - d[IMAGE] if on == "text" else d[FULL] - d[NULL]
        clean = without + lam * with_both
        x = clean + at.sigma_down * (x - without) / at.sigma
        if plan.ancestral and at.sigma_next > 0:
            x = x + math.sqrt(at.sigma_next**2 - at.sigma_down**2) * noises[at.index]
    torch.testing.assert_close(got, x, rtol=1e-8, atol=1e-8)


def test_cfgpp_takes_its_strength_from_the_scale_unless_given():
    at = Step(0, 10, 2.0, 1.5, 1.5)
    assert stack("cfgpp", 7.5).scales_at(at)["text"] == pytest.approx(0.6 * 2.0 / 0.5)
    assert stack("cfgpp:lam=0.3", 7.5).scales_at(at)["text"] == pytest.approx(0.3 * 2.0 / 0.5)


def test_cads_noises_the_instruction_at_first():
    text, noise = random(1, 2, 7, 6), random(2, 2, 7, 6)
    for index, count, gamma in ((0, 10, 0.0), (2, 10, 1 / 3), (4, 10, 1.0), (9, 10, 1.0)):
        got = ConditionAnnealing(psi=0.8).change(
            text.float(), lambda index: noise.float(), Step(index, count, 1.0, 0.5, 0.5)
        )

        def formula(y, n, gamma=gamma):
            noised = math.sqrt(gamma) * y + 0.25 * math.sqrt(1 - gamma) * n
            restored = (noised - noised.mean()) / noised.std() * y.std() + y.mean()
            return 0.8 * restored + 0.2 * noised

        expected = each(formula, text, noise) if gamma < 1 else text
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_mask_is_the_relevance_above_its_threshold():
    difference = random(3).float()
    difference[0, :, 2:4, 1:3] *= 20
    soft = RelevanceMask(threshold=0.0).mask(difference)
    for sample, got in zip(difference, soft, strict=True):
        relevance = sample.abs().sum(0)
        first, third = (relevance.flatten().quantile(q) for q in (0.25, 0.75))
        clipped = relevance.clamp(max=(third + 1.5 * (third - first)).item())
        expected = (clipped - clipped.min()) / (clipped.max() - clipped.min())
        torch.testing.assert_close(got[0], expected)
    hard = RelevanceMask(threshold=0.5).mask(difference)
    assert torch.equal(hard, (soft > 0.5).float()) and hard[0, 0, 2:4, 1:3].all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_mask_the_source_stays_at_the_noise_of_each_step(sampler):
    schedule, noise = Schedule(), random(9).float()
    source, mask = random(7).float(), (random(8, 3, 1, 6, 5) > 0).float()
    text = torch.zeros(3, 77, 4)
    shown = Conditions(text, text, source_latents=source, latents=source)
    guided = GuidedDenoiser(
        lambda x, *_: x.sin(), schedule, stack("mask"), shown, attention_layers=["mid"]
    )
    guided.mask = mask
    plan = make_plan(schedule, sampler, "trailing", 6)
    seen = []

    def recording(x, sigma, step):
        seen.append((x, sigma))
        return guided(x, sigma, step)

    start = noise * plan.start_factor
    end = SAMPLERS[sampler](recording, start, plan, lambda index: torch.zeros(SHAPE))
    outside = mask.expand(SHAPE) == 0
    unit = (start - source) / plan.sigmas[0]
    if not plan.ancestral:  # these replace the noise by fresh noise, here none
        for x, sigma in seen:
            expected = source + sigma * unit
            torch.testing.assert_close(x[outside], expected[outside], rtol=1e-4, atol=1e-4)
    expected = source + plan.sigmas[-1] * unit
    torch.testing.assert_close(end[outside], expected[outside], rtol=1e-4, atol=1e-4)
    assert (end - expected)[~outside].abs().max() > 0.1
