"""Linear guidance schemes: their identities, and that only the needed branches run."""

import math

import pytest
import torch

from ipx2p.diffusion.guidance.branches import BRANCHES, Conditions
from ipx2p.diffusion.guidance.denoiser import GuidedDenoiser
from ipx2p.diffusion.guidance.registry import SCHEMES
from ipx2p.diffusion.schedule import Schedule, ScheduleConfig, Step
from ipx2p.errors import InputError
from tests.diffusion.started import Started

LINEAR = [name for name, scheme in SCHEMES.items() if scheme.is_linear]
STEP = Step(0, 1, 1.0, 0.5, 0.5)
SCALES = [(7.0, 1.5), (1.0, 1.0), (0.0, 1.0), (3.0, 3.0), (-1.0, 0.9), (7.5, 0.0)]


def guidance(spec, guidance_scale=7.0, image_guidance_scale=1.5):
    return Started(spec, guidance_scale, image_guidance_scale)


def random_predictions(seed=0):
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 4, 3, 5, generator=source).double() for name in BRANCHES}


def blend(spec, scales, predictions):
    scheme = guidance(spec, *scales)
    shown = {branch: predictions[branch.name] for branch in scheme.branches(STEP)}
    return scheme.blend(shown, torch.zeros(1), 1.0, STEP)


def names(scheme):
    """Names of the branches that run."""
    return [branch.name for branch in scheme.branches(STEP)]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("name", LINEAR)
def test_coefficients_sum_to_one(name, scales):
    coefficients = guidance(name, *scales).coefficients
    assert sum(coefficients.values()) == pytest.approx(1, abs=1e-12)
    assert 0 not in coefficients.values()


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("name", LINEAR)
def test_equal_predictions_come_out_unchanged(name, scales):
    same = random_predictions()["full"]
    got = blend(name, scales, dict.fromkeys(BRANCHES, same))
    torch.testing.assert_close(got, same)


def test_ip2p_is_the_formula_of_the_paper():
    p = random_predictions()
    expected = p["null"] + 1.5 * (p["image"] - p["null"]) + 7 * (p["full"] - p["image"])
    torch.testing.assert_close(blend("ip2p", (7.0, 1.5), p), expected)


def test_the_other_schemes_are_their_formulas():
    p = random_predictions()
    full, image, text, null = p["full"], p["image"], p["text"], p["null"]
    t, i, j = 7.0, 1.5, 4.0
    expected = {
        "text_first": null + t * (text - null) + i * (full - text),
        "joint": null + t * (full - null),
        "text_only": image + t * (full - image),
        "image_only": text + i * (full - text),
        "symmetric": 0.5 * (image + text) + t * (full - image) + i * (full - text),
        "composable": null + i * (image - null) + t * (text - null),
        "full:joint_scale=4": null
        + i * (image - null)
        + t * (text - null)
        + j * (full - image - text + null),
        "nested": null + i * ((image + t * (full - image)) - null),
        "free:null=-0.5,image=2,text=-3": -0.5 * null + 2 * image - 3 * text + 2.5 * full,
    }
    assert {name.partition(":")[0] for name in expected} == {*LINEAR} - {"ip2p"}
    for spec, value in expected.items():
        torch.testing.assert_close(blend(spec, (t, i), p), value)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_equal_scales_are_plain_guidance(scale):
    p = random_predictions()
    plain = p["null"] + scale * (p["full"] - p["null"])
    torch.testing.assert_close(blend("ip2p", (scale, scale), p), plain)
    torch.testing.assert_close(blend("text_first", (scale, scale), p), plain)
    torch.testing.assert_close(blend("joint", (scale, 3.0), p), plain)
    torch.testing.assert_close(blend(f"full:joint_scale={scale}", (scale, scale), p), plain)


@pytest.mark.parametrize("name", sorted({*LINEAR} - {"composable", "symmetric"}))
def test_scales_of_one_give_the_full_branch(name):
    assert guidance(name, 1.0, 1.0).coefficients == {BRANCHES["full"]: 1.0}


def test_symmetric_gives_the_full_branch_at_one_half():
    assert guidance("symmetric", 0.5, 0.5).coefficients == {BRANCHES["full"]: 1.0}


@pytest.mark.parametrize("scales", SCALES)
def test_composable_never_sees_the_full_branch(scales):
    assert "full" not in names(guidance("composable", *scales))


def test_nested_is_ip2p_with_multiplied_scales():
    p = random_predictions()
    torch.testing.assert_close(blend("nested", (4.0, 1.5), p), blend("ip2p", (6.0, 1.5), p))


@pytest.mark.parametrize(
    ("spec", "scales", "branches"),
    [
        ("ip2p", (7.0, 1.5), {"full", "image", "null"}),
        ("ip2p", (7.0, 1.0), {"full", "image"}),
        ("ip2p", (3.0, 3.0), {"full", "null"}),
        ("ip2p", (0.0, 1.5), {"image", "null"}),
        ("ip2p", (1.1 - 0.1, 1.2 - 0.2), {"full"}),
        ("symmetric", (7.0, 1.5), {"full", "image", "text"}),
        ("composable", (7.0, 1.5), {"image", "text", "null"}),
        ("full:joint_scale=2", (7.0, 1.5), {"full", "image", "text", "null"}),
        ("joint", (7.0, 1.5), {"full", "null"}),
        ("free", (7.0, 1.5), {"full"}),
        ("free:null=0.4,text=0.6", (7.0, 1.5), {"text", "null"}),
    ],
)
def test_only_branches_with_a_coefficient_run(spec, scales, branches):
    assert set(names(guidance(spec, *scales))) == branches


def record_network(calls):
    """A network that depends on everything it is shown, and notes it."""

    def network(latents, timesteps, text, source_latents):
        calls.append((latents, timesteps, text, source_latents))
        return latents + text.mean(dim=(1, 2))[:, None, None, None] + 2 * source_latents

    return network


@pytest.fixture
def conditions(generator):
    return Conditions(
        text=torch.randn(2, 77, 6, generator=generator),
        null_text=torch.randn(2, 77, 6, generator=generator),
        source_latents=torch.randn(2, 4, 3, 5, generator=generator),
    )


@pytest.mark.parametrize("spec", ["ip2p", "full", "symmetric"])
def test_branches_in_one_batch_equal_branches_one_by_one(conditions, generator, spec):
    x = torch.randn(2, 4, 3, 5, generator=generator)
    calls, results = [], []
    for batch_branches in (True, False):
        denoiser = GuidedDenoiser(
            record_network(calls),
            Schedule(),
            guidance(spec),
            conditions,
            batch_branches=batch_branches,
        )
        results.append(denoiser(x, 2.0, STEP))
    torch.testing.assert_close(*results)
    num_branches = len(names(guidance(spec)))
    assert [len(latents) for latents, *_ in calls] == [2 * num_branches] + [2] * num_branches


def test_branches_see_what_their_names_say(conditions, generator):
    calls = []
    denoiser = GuidedDenoiser(
        record_network(calls), Schedule(), guidance("full"), conditions, batch_branches=False
    )
    denoiser(torch.randn(2, 4, 3, 5, generator=generator), 2.0, STEP)
    for branch, (_, _, text, source) in zip(names(guidance("full")), calls, strict=True):
        expected = conditions.text if branch in ("full", "text") else conditions.null_text
        assert torch.equal(text, expected)
        shown = branch in ("full", "image")
        assert torch.equal(source, conditions.source_latents if shown else 0 * source)


def test_network_gets_noisy_latents_at_unit_variance_and_the_source_as_it_is(conditions):
    calls = []
    schedule = Schedule()
    denoiser = GuidedDenoiser(
        record_network(calls), schedule, guidance("ip2p", 1.0, 1.0), conditions
    )
    x = torch.full((2, 4, 3, 5), 3.0)
    sigma = schedule.sigma(946.42)
    denoiser(x, sigma, STEP)
    latents, timesteps, _, source = calls[0]
    torch.testing.assert_close(latents, x / math.sqrt(1 + sigma**2))
    torch.testing.assert_close(timesteps, torch.full((2,), 946.42))
    assert torch.equal(source, conditions.source_latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", LINEAR)
def test_blending_predictions_or_denoised_latents_is_the_same(conditions, name, prediction_type):
    schedule = Schedule(ScheduleConfig(prediction_type=prediction_type))
    scheme, sigma = guidance(name), 2.0
    network = record_network([])
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    guided = GuidedDenoiser(network, schedule, scheme, conditions)(x, sigma, STEP)
    scaled = x / math.sqrt(1 + sigma**2)
    predictions = {
        branch: network(scaled, None, *conditions.of(branch)) for branch in scheme.branches(STEP)
    }
    expected = schedule.denoised(scheme.blend(predictions, x, sigma, STEP), x, sigma)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "scales", "message"),
    [
        ("ip2", (7.0, 1.5), "unknown guidance scheme 'ip2'; did you mean ip2p.*symmetric"),
        ("ip2p", (math.nan, 1.5), "guidance_scale is nan, expected a finite number"),
        ("ip2p", (7.0, math.inf), "image_guidance_scale is inf"),
        ("full:joint=3", (7.0, 1.5), "no parameter 'joint'; did you mean joint_scale"),
        ("full:joint_scale=x", (7.0, 1.5), "full:joint_scale is 'x', expected a number"),
        ("full:joint_scale=nan", (7.0, 1.5), "joint_scale is 'nan', expected a number"),
        ("ip2p:eta=1", (7.0, 1.5), "ip2p has no parameter 'eta'; it has none"),
        ("", (7.0, 1.5), "unknown guidance scheme ''; known here: ip2p, .*apg"),
        ("apg+", (7.0, 1.5), r"unknown guidance scheme 'apg\+'; did you mean apg"),
        ("ip2p+apq", (7.0, 1.5), "unknown guidance scheme 'apq'; did you mean apg"),
        ("ip2p+joint", (7.0, 1.5), "names two linear schemes, ip2p and joint"),
        ("apg:etta=1", (7.0, 1.5), "apg has no parameter 'etta'; did you mean eta.*momentum"),
        ("apg:eta=1.5", (7.0, 1.5), "apg:eta is '1.5', out of range: expected 0 to 1"),
        ("apg:norm=0", (7.0, 1.5), "out of range: expected 1e-06 to inf"),
        ("apg:eta", (7.0, 1.5), "apg:eta is '', expected a number"),
        ("apg:after=1.5", (7.0, 1.5), "apg:after is '1.5', expected a whole number"),
        ("apg:joint=maybe", (7.0, 1.5), "apg:joint is 'maybe', expected true or false"),
        ("apg:joint=true,on=text", (7.0, 1.5), "joint=true acts on the sum of both pushes, so it"),
        ("power_law:joint=1,on=image", (7.0, 1.5), "power_law: joint=true .* with on=image"),
        ("apg:on=txt", (7.0, 1.5), "apg:on is 'txt', which is not known; did you mean text"),
        ("schedule:curve=cosin", (7.0, 1.5), "'cosin', which is not known; did you mean cosine"),
        ("interval:low=2,high=1", (7.0, 1.5), "interval: low 2.0 must be below high 1.0"),
        ("pag:low=2,high=1", (7.0, 1.5), "pag: low 2.0 must be below high 1.0"),
        ("cads:tau1=0.9,tau2=0.5", (7.0, 1.5), "tau1 0.9 must not be above tau2 0.5"),
        (
            "interval+interval:on=text",
            (7.0, 1.5),
            "has interval twice: keep one.* or give each its own",
        ),
        ("apg:eta=0,eta=1", (7.0, 1.5), "apg has eta twice: keep one of them"),
        ("apg:", (7.0, 1.5), "apg has no parameter ''; known here: eta"),
        ("apg:eta=0,", (7.0, 1.5), "apg has no parameter ''"),
        ("apg:norm=1e400", (7.0, 1.5), "norm is '1e400', out of range: expected 1e-06 to inf"),
        ("apg:norm=1_0", (7.0, 1.5), "norm is '1_0', expected a number"),
        ("apg:norm=\uff11", (7.0, 1.5), "norm is '\uff11', expected a number"),
        ("apg:after=" + "9" * 5000, (7.0, 1.5), r"after is '9{60}\.\.\.', expected a whole number"),
        ("apg:after=5000", (7.0, 1.5), "after is '5000', out of range: expected 0 to 1000"),
        ("apg:eta=\nx", (7.0, 1.5), r"eta is '\\nx', expected a number"),
        ("apg:\u2028=1", (7.0, 1.5), r"no parameter '\\u2028'"),
        ("interval:high=-inf", (7.0, 1.5), "high is '-inf', expected a number"),
        (None, (7.0, 1.5), "guidance is None, expected a text such as 'ip2p"),
        ("ip2p", ("7", 1.5), "guidance_scale is '7', expected a finite number"),
        ("ip2p", (7.0, None), "image_guidance_scale is None, expected a finite number"),
        ("ip2p", (10**400, 1.5), "guidance_scale is 10{50,}, expected a finite number"),
        (
            "nested+cfgpp:on=both",
            (7.0, 1.5),
            "cfgpp:on=both does not go with nested.* set on=image",
        ),
        ("pag+pag:layers=up", (7.0, 1.5), "has pag twice: keep one of them$"),
        ("composable+interval", (7.0, 1.5), "which composable never gives: choose another"),
        ("image_only+perp_neg", (7.0, 1.5), "perp_neg needs a push along the instruction"),
    ],
)
def test_bad_schemes_are_refused(spec, scales, message):
    with pytest.raises(InputError, match=message) as error:
        guidance(spec, *scales)
    assert "\n" not in str(error.value)
