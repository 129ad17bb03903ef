"""Sweeps: which lines differ in one knob, and what they are called."""

from dataclasses import replace

from ipx2p.eval.lines import ALL, Line
from ipx2p.eval.sweeps import knobs_of, series_of, sweeps_of
from tests.eval.folders import settings_of


def line(model="m", **settings):
    settings = {"guidance": "ip2p", "scale": 7.0, "image_scale": 1.5} | settings
    return Line(model, settings_of(**settings), ALL, 2, 2)


def shown(lines):
    return [(one.of, one.knob, one.values) for one in sweeps_of(lines)]


def test_knobs_are_the_numbers_of_settings_and_of_the_parameters_of_guidance():
    words, numbers = knobs_of(line(guidance="rescale:phi=0.3+interval:low=1,high=2,on=text"))
    assert (
        words.items()
        >= {
            "model": "m",
            "sampler": "euler",
            "spacing": "linspace",
            "guidance": "ip2p+rescale+interval",
            "interval on": "text",
        }.items()
    )
    assert numbers == {
        "num steps": 20,
        "guidance scale": 7,
        "image guidance scale": 1.5,
        "window": 0,
        "rescale phi": 0.3,
        "interval low": 1,
        "interval high": 2,
    }
    words, numbers = knobs_of(line(guidance="joint"))
    assert "image guidance scale" not in words | numbers  # it has no effect


def test_stacks_of_other_settings_are_taken_apart_too():
    held = {"fidelity": "mask:threshold=0.1", "fidelity_in_full": "mask:threshold=0.1,levels=3"}
    plain = line(guidance="mask:threshold=0.5")
    words, numbers = knobs_of(replace(plain, settings=plain.settings | held))
    assert words["fidelity"] == "mask"
    assert (numbers["mask threshold"], numbers["fidelity mask threshold"]) == (0.5, 0.1)
    assert numbers["mask levels"] == 3


def test_sweeps_of_single_knobs_meet_where_they_were_made_to():
    lines = [line(scale=scale) for scale in (3.0, 7.0, 12.0)]
    lines += [line(image_scale=scale) for scale in (2.0, 1.0)]
    lines += [line(num_steps=40)]
    assert shown(lines) == [
        ("", "num steps", [20, 40]),
        ("", "guidance scale", [3, 7, 12]),
        ("", "image guidance scale", [1, 1.5, 2]),
    ]
    through = "num steps 20, guidance scale 7, image guidance scale 1.5"
    assert {one.through for one in sweeps_of(lines)} == {through}


def test_sweeps_of_a_grid_meet_in_its_middle():
    grid = [line(scale=a, image_scale=b) for a in (1.0, 2.0, 3.0) for b in (1.0, 1.5, 2.0)]
    assert [one.through for one in sweeps_of(grid)] == [
        "guidance scale 2, image guidance scale 1.5"
    ] * 2
    assert shown(grid) == [
        ("", "guidance scale", [1, 2, 3]),
        ("", "image guidance scale", [1, 1.5, 2]),
    ]


def test_a_parameter_of_a_scheme_is_swept_like_a_scale():
    lines = [line(guidance=f"ip2p+rescale:phi={phi}") for phi in (0.9, 0, 0.5)]
    alone = ("ip2p", "", [])
    assert shown([*lines, line()]) == [("ip2p+rescale", "rescale phi", [0, 0.5, 0.9]), alone]


def test_models_and_samplers_have_sweeps_of_their_own():
    lines = [
        line(model, sampler=sampler, scale=scale)
        for model in ("a", "b")
        for sampler in ("euler", "heun")
        for scale in (1.0, 2.0)
    ]
    names = [f"{model}, {sampler}" for model in "ab" for sampler in ("euler", "heun")]
    assert shown(lines) == [(name, "guidance scale", [1, 2]) for name in names]
    assert [*series_of(lines)] == names
    assert [len(some) for some in series_of(lines).values()] == [2] * 4


def test_lines_that_differ_in_nothing_or_in_much_are_no_sweep():
    assert sweeps_of([]) == [] and shown([line()]) == [("", "", [])]
    assert sweeps_of([line(scale=1.0, image_scale=1.0), line(scale=2.0, image_scale=2.0)]) == []
