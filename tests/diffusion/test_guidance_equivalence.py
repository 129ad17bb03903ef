"""Which stacks are the same: effective scales and canonical texts, against made-up predictions."""

import contextlib
import itertools
import zlib

import pytest
import torch

from ipx2p.diffusion.guidance.registry import SCHEMES, parse_guidance
from ipx2p.diffusion.schedule import Step
from ipx2p.editing.settings import EditSettings
from ipx2p.errors import InputError
from tests.diffusion.started import Started

LINEAR = [name for name, scheme in SCHEMES.items() if scheme.is_linear]
MODIFIERS = [name for name in SCHEMES if name not in LINEAR]
SIGMAS = (14.0, 3.0, 0.5, 0.1, 0.0)
SHAPE = (2, 4, 5, 6)
SPECS = [
    *LINEAR,
    *(f"{base}+{name}" for base in ("ip2p", "nested", "symmetric", "free") for name in MODIFIERS),
    *(f"ip2p+{SCHEMES[name].about.plain}" for name in MODIFIERS if SCHEMES[name].idle),
    *("fdg:low=0.3,high=0.3", "apg:eta=1,norm=inf,momentum=0,gain=2,joint=true", "apg+tcfg"),
    *("fdg:low=2,high=2,on=text", "tcfg:on=text", "interval+pag", "schedule+apg", "nested+fdg"),
    *("fdg:low=2,high=2+mimic:scale=9", "apg:eta=1,norm=inf,momentum=0,gain=2,after=2"),
    *("tcfg+interval", "full:joint_scale=7", "free:null=-0.5,image=-2", "free:text=2"),
]
SCALES = [(7.0, 1.5), (1.0, 1.0), (5.0, 1.5), (7.5, 1.5), (1.0, 1.5), (4.0, 1.0), (0.5, 0.5)]


def predictions(name, dtype):
    """Of one branch in each step, the same whatever asks for it."""
    source = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(len(SIGMAS), *SHAPE, generator=source).to(dtype)


def run(spec, scales, dtype=torch.float64):
    """Guided predictions of each step."""
    edit, guided = Started(spec, *scales), []
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(SIGMAS)):
        step = Step(index, len(SIGMAS) - 1, sigma, sigma_next, sigma_next)
        denoised = {b: predictions(b.name, dtype)[index] for b in edit.branches(step)}
        guided.append(edit.blend(denoised, sigma * predictions("x", dtype)[index], sigma, step))
    return torch.stack(guided)


def stacks():
    for spec, scales in itertools.product(SPECS, SCALES):
        with contextlib.suppress(InputError):  # those that do not stack
            yield spec, scales, Started(spec, *scales).spec


@pytest.mark.parametrize(
    ("spec", "scales", "effective"),
    [
        ("ip2p", (5.0, 1.5), (5.0, 1.5)),
        ("nested", (5.0, 1.5), (7.5, 1.5)),
        ("fdg:low=0.3,high=0.3", (5.0, 1.5), (2.2, 1.15)),
        ("fdg:low=0.3,high=0.3,on=text", (5.0, 1.5), (2.2, 1.5)),
        ("joint", (5.0, 1.5), (5.0, 5.0)),
        ("text_only", (5.0, 1.5), (5.0, 1.0)),
        ("text_first", (3.0, 3.0), (3.0, 3.0)),
        ("symmetric", (5.0, 0.5), (5.5, 1.0)),
        ("composable", (0.0, 1.5), (0.0, 1.5)),
        ("full:joint_scale=7", (7.0, 1.5), (7.0, 1.5)),
        ("free:null=-0.5,image=-2", (5.0, 1.5), (3.5, 1.5)),
        ("schedule:curve=constant+pag:scale=0+rescale:phi=0", (5.0, 1.5), (5.0, 1.5)),
        ("mimic:scale=9", (5.0, 1.5), (5.0, 1.5)),
        ("tcfg", (1.0, 1.0), (1.0, 1.0)),
        *((spec, (5.0, 1.5), None) for spec in ("text_first", "symmetric", "composable", "full")),
        *((name, (5.0, 1.5), None) for name in ("tcfg", "apg", "fdg", "interval", "pag", "mask")),
        ("mimic", (5.0, 1.5), None),
        ("cads", (1.0, 1.0), None),
    ],
)
def test_effective_scales_are_those_of_ip2p_or_none(spec, scales, effective):
    assert Started(spec, *scales).effective_scales == effective


def test_at_its_effective_scales_ip2p_is_the_same_stack():
    found = 0
    for spec, scales, parsed in stacks():
        effective = parsed.effective_scales
        if effective is not None:
            error = (run(spec, scales) - run("ip2p", effective)).abs().max()
            assert error < 1e-12, (spec, scales, effective)
            found += 1
    assert found > 100


def test_a_stack_without_effective_scales_is_no_ip2p():
    """Least squares over all scales of ip2p leaves something over."""
    outside = {"cads", "mask", "perp_neg", "deepcache"}
    for spec, scales, parsed in stacks():
        names = {scheme.name for scheme in parsed.schemes}
        # These act outside the blend; and scales of 1 and less hold special cases.
        if parsed.effective_scales is None and min(scales) > 1 and not outside & names:
            full, image, null = (
                predictions(name, torch.float64)[:-1] for name in ("full", "image", "null")
            )
            basis = torch.stack([(full - image).flatten(), (image - null).flatten()], dim=1)
            wanted = (run(spec, scales) - null).flatten()[:, None]
            left = wanted - basis @ torch.linalg.lstsq(basis, wanted).solution
            told = f"{spec} is ip2p at other scales: a modifier that only scales gives as_factor"
            assert left.abs().max() > 1e-6, (told, scales)


def test_stacks_of_one_canonical_text_are_equal_bit_for_bit():
    groups = {}
    for spec, scales, parsed in stacks():
        groups.setdefault(parsed.canonical, []).append((spec, scales))
    assert sum(len(group) > 1 for group in groups.values()) > 10
    for group in groups.values():
        first, *others = (run(*stack, torch.float32) for stack in group)
        assert all(torch.equal(first, other) for other in others), group


def test_guidance_that_does_nothing_is_the_same_computation():
    def canonical(spec, *scales):
        return Started(spec, *scales).canonical

    alone = canonical("ip2p", 1.0, 1.0)
    for spec in ("tcfg", "interval", "apg+rescale+schedule", "joint", "nested+mimic", "text_first"):
        assert canonical(spec, 1.0, 1.0) == alone
    assert canonical("nested", 5.0, 1.5) == canonical("ip2p", 7.5, 1.5)
    assert canonical("joint+tcfg", 3.0, 1.0) == canonical("joint+tcfg", 3.0, 2.0)
    for spec in ("cads", "mask", "perp_neg:strength=0", "pag", "cfgpp", "dynamic_threshold"):
        assert canonical(spec, 1.0, 1.0) != alone
    assert canonical("interval+pag", 1.0, 1.0) != canonical("pag", 1.0, 1.0)
    assert canonical("fdg:low=2,high=2", 3.0, 1.0) != canonical(
        "ip2p", 5.0, 1.0
    )  # but for rounding


def test_a_specification_is_a_value():
    one, same, other = (
        parse_guidance(text, guidance_scale=scale, image_guidance_scale=1.5)
        for text, scale in (("apg:eta=0.0", 7), ("ip2p+apg", 7.0), ("apg", 6.0))
    )
    assert one == same and hash(one) == hash(same) and one != other
    settings = EditSettings(guidance="apg")
    assert settings.spec is settings.spec  # parsed once, however often it is asked for
    assert (
        str(same) == "ip2p+apg:eta=0.0,norm=7.5,momentum=-0.75,after=0,gain=1.0,joint=False,on=both"
    )
    with pytest.raises(AttributeError):
        one.guidance_scale = 3.0
    with pytest.raises(AttributeError):
        one.modifiers[0].eta = 1.0
