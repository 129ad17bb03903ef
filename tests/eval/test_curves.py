"""Curves of a report: what is drawn, where, and with which labels."""

import io
from dataclasses import replace

import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from ipx2p.eval import curves, plots
from ipx2p.eval.intervals import Estimate
from ipx2p.eval.lines import ALL, Line
from ipx2p.eval.scores import METRICS
from tests.eval.folders import settings_of


def line(guidance, scale, image_scale, evaluations=60, sampler="euler", model="m", **means):
    settings = settings_of(guidance, scale, image_scale, sampler=sampler)
    scores = {name: Estimate(mean) for name, mean in means.items()}
    label = f"{model}, {guidance}, {scale:g}, {image_scale:g}"
    given = {"scores": scores, "label": label, "best": ("psnr", "ssim")}
    return Line(model, settings, ALL, 2, 2, 0, evaluations, 1.5, **given)


def identity(**means):
    scores = {name: Estimate(mean) for name, mean in means.items()}
    return Line("identity", None, ALL, 2, 2, scores=scores, label="identity")


@pytest.fixture
def drawn(monkeypatch):
    """Arguments of every figure, which is not drawn."""
    calls = []

    def draw_panels(panels, x, y, identity=None, **how):
        calls.append((panels, x, y, identity, how))
        return b""

    monkeypatch.setattr(curves, "draw_panels", draw_panels)
    monkeypatch.setattr(curves, "draw_rows", lambda *given: calls.append(given) or b"")
    return calls


def test_curves_of_everything_that_can_be_drawn():
    lines = [identity(**dict.fromkeys(METRICS, 0.5))]
    for guidance, cost in (("ip2p", 60), ("fdg:low=0.5,high=0.5", 80)):
        for scale in (3.0, 7.0):
            for image_scale in (1.0, 1.5, 2.0):
                means = dict.fromkeys(METRICS, 0.1 * scale + 0.05 * image_scale)
                lines.append(line(guidance, scale, image_scale, cost, **means))
    made = {curve.name: curve for curve in curves.make_curves(lines)}
    how = "euler_20_steps"
    choosing = [name for name, metric in METRICS.items() if metric.chooses]
    names = [f"{name}_{how}" for name in curves.PLANES]
    names += [f"{name}_scale_{how}" for name in choosing]
    names += ["psnr_evaluations", "ssim_evaluations", *(f"{n}_knobs" for n in curves.PLANES)]
    assert [*made] == names
    for curve in made.values():
        assert Image.open(io.BytesIO(curve.png)).width > 600
    assert "labelled by effective image guidance scale" in made[f"trade_off_{how}"].caption


def test_the_trade_off_has_the_axes_of_the_paper(monkeypatch):
    """Fig. 8 of InstructPix2Pix: direction similarity to the right, image similarity upwards."""
    seen = []
    monkeypatch.setattr(plots, "place_labels", lambda axes, labels: seen.append((axes, labels)))
    lines = [identity(clip_image=1.0, clip_direction=0.0)]
    for spec in ("ip2p", "joint"):
        for scale in (1.0, 2.0) if spec == "ip2p" else (1.0,):
            means = {"clip_image": 0.7 + 0.1 * scale, "clip_direction": 0.3 - 0.1 * scale}
            lines.append(line(spec, 7.0, scale, **means))
    curves.make_curves(lines)
    [(axes, labels)] = [(axes, labels) for axes, labels in seen if labels]
    assert axes.get_xlabel() == "CLIP direction similarity"
    assert axes.get_ylabel() == "CLIP image similarity"
    # A scheme without image guidance scale is one point, without a label.
    assert [(x, y, text) for x, y, text, _ in labels] == [
        (pytest.approx(0.2), pytest.approx(0.8), "1"),
        (pytest.approx(0.1), pytest.approx(0.9), "2"),
    ]
    lengths = [len(one.get_xdata()) for one in axes.lines]
    assert lengths == [2, 1, 2]  # both schemes, and the front


def test_keeping_is_drawn_against_following_with_one_line_for_each_knob(drawn):
    """PSNR to the target to the right, HaarPSI outside of what may change upwards."""
    lines = [identity(psnr=20.0, outside_haarpsi=1.0)]
    for scale, image_scale, phi in ((3.0, 1.5, 0), (7.0, 1.5, 0), (7.0, 2.0, 0), (7.0, 1.5, 0.7)):
        means = {"psnr": 20 + scale / image_scale, "outside_haarpsi": image_scale / 4 + phi / 8}
        lines.append(line(f"rescale:phi={phi}", scale, image_scale, **means))
    made = {curve.name: curve for curve in curves.make_curves(lines)}
    [(panels, x, y, _, how)] = [call for call in drawn if len(call[0].get("", [])) == 3]
    assert (x, y) == ("PSNR, dB", "HaarPSI outside") and how["front"] == (1, 1)
    found = {
        one.label: (one.texts, [(a.mean, b.mean) for a, b in one.points]) for one in panels[""]
    }
    base = (20 + 7 / 1.5, 0.375)
    assert found == {
        "guidance scale": (["3", "7"], [(22.0, 0.375), base]),
        "image guidance scale": (["1.5", "2"], [base, (23.5, 0.5)]),
        "rescale phi": (["0", "0.7"], [base, (base[0], pytest.approx(0.4625))]),
    }
    caption = made["trade_off_pixels_knobs"].caption
    fixed = "guidance scale 7, image guidance scale 1.5, rescale phi 0."
    assert fixed in caption and "HaarPSI outside: to the source, where it must not" in caption
    # what is not defined has no place
    drawn.clear()
    bare = [replace(one, scores={"psnr": one.scores["psnr"]}) for one in lines]
    assert not [curve for curve in curves.make_curves(bare) if "trade_off" in curve.name]


def test_a_sweep_of_one_scale_is_drawn_once(drawn):
    means = {"psnr": 20.0, "outside_haarpsi": 0.5}
    made = curves.make_curves([line("ip2p", 7.0, scale, **means) for scale in (1.0, 2.0)])
    names = [curve.name for curve in made]
    assert names == ["trade_off_pixels_euler_20_steps", "psnr_scale_euler_20_steps"]


def test_a_place_in_the_trade_off_has_intervals_both_ways(monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "place_labels", lambda axes, labels: seen.append(axes))
    points = [
        (Estimate(20.0, 19.0, 22.0), Estimate(0.5, 0.4, 0.7)),
        (Estimate(21.0), Estimate(0.6)),
    ]
    plots.draw_panels({"": [plots.Series("a", points)]}, "x", "y")
    [bars] = seen[0].containers
    across, up = ([path.vertices.tolist() for path in one.get_paths()] for one in bars.lines[2])
    assert across[0] == [[19, 0.5], [22, 0.5]] and up[0] == [[20, 0.4], [20, 0.7]]
    assert seen[0].lines[0].get_xydata().tolist() == [[20, 0.5], [21, 0.6]]


def test_models_and_samplers_have_lines_of_their_own_against_evaluations(drawn):
    lines = [identity(psnr=20.0)]
    for model in ("a", "b"):
        for sampler in ("euler", "heun"):
            for cost in (1, 2):
                more = {"sampler": sampler, "model": model, "psnr": cost}
                lines.append(line("ip2p", 1.0, 1.0, cost, **more))
    curves.make_curves(lines)
    panels, _, _, value, how = next(call for call in drawn if call[1:2] == (curves.EVALUATIONS,))
    names = ["a, euler", "a, heun", "b, euler", "b, heun"]
    assert sorted(one.label for one in panels[""]) == names
    assert value == 20.0 and how["front"] == (-1, 1)  # few evaluations and much PSNR are better
    points = [(cost, score.mean) for cost, score in panels[""][0].points]
    assert points == [(1, 1.0), (2, 2.0)]


def test_models_without_scales_have_a_trade_off_and_intervals(drawn):
    lines = [identity(clip_image=1.0, clip_direction=0.0, psnr=20.0)]
    for model in ("a", "b"):
        means = {"clip_image": 0.9, "clip_direction": 0.1, "psnr": 25.0}
        lines.append(line("ip2p", 1.0, 1.0, model=model, **means))
    made = curves.make_curves(lines)
    assert [curve.name for curve in made] == ["trade_off", "intervals"]
    (panels, _, _, _, how), (labels, columns, grey) = drawn
    assert [one.label for one in panels[""]] == ["identity", "a", "b"]
    assert how["front"] == (1, 1)
    assert labels == [one.label for one in lines] and grey == [True, False, False]
    assert [*columns] == ["PSNR, dB"]


def test_points_stand_at_effective_scales_or_are_called_nominal(drawn):
    lines = [identity(clip_image=1.0, clip_direction=0.0, change=0.0)]
    for spec in ("nested", "tcfg"):
        means = {"clip_image": 0.5, "clip_direction": 0.1}
        lines += [line(spec, scale, 1.5, change=scale, **means) for scale in (1.0, 2.0)]
    trade_off, _ = curves.make_curves(lines)
    (trade_off_panels, *_), (panels, x, *_) = drawn
    assert [(one.label, one.texts) for [*panel] in trade_off_panels.values() for one in panel] == [
        *(("nested", ["1.5", "3"]), ("tcfg (nominal scale)", ["1", "2"]))
    ]
    points = {
        one.label: [(x, y.mean) for x, y in one.points] for some in panels.values() for one in some
    }
    assert points == {
        "nested": [(1.5, 1.0), (3.0, 2.0)],
        "tcfg (nominal scale)": [(1.0, 1.0), (2.0, 2.0)],
    }
    assert x == "effective guidance scale"
    assert "labelled by effective guidance scale" in trade_off.caption
    # Where all of them stand where they were set, nothing is said.
    drawn.clear()
    plain = [one for one in lines if one.settings is None or "tcfg" in one.settings["guidance"]]
    curves.make_curves(plain)
    assert drawn[1][1] == "guidance scale"
    assert [one.label for panel in drawn[1][0].values() for one in panel] == ["tcfg"]


def test_each_task_has_curves_of_its_own(drawn):
    """PSNR rises with the scale in one task and falls in the other: a mean of both is flat."""
    lines = []
    for task, sign in ((ALL, 0), ("rise", 1), ("fall", -1)):
        lines.append(replace(identity(psnr=20.0), task=task))
        made = [line("ip2p", s, 1.0, psnr=20 + sign * s) for s in (1.0, 2.0)]
        lines += [replace(one, task=task) for one in made]
    made = curves.make_curves(lines)
    assert [curve.name.split("_")[:2] for curve in made] == [
        *(["rise", "psnr-scale-euler-20-steps"], ["fall", "psnr-scale-euler-20-steps"])
    ]
    assert made[0].caption.startswith("rise: PSNR")
    ends = [[y.mean for _, y in panel[0].points] for call in drawn for panel in call[0].values()]
    assert ends == [[21, 22], [19, 18]]


@pytest.mark.parametrize("metric", ["psnr", "ssim", "change"])
def test_curves_are_drawn_for_the_metrics_that_were_measured(metric, drawn):
    lines = [identity(**{metric: 1.0})]
    lines += [line("ip2p", scale, 1.0, **{metric: scale}) for scale in (1.0, 2.0)]
    assert [curve.name for curve in curves.make_curves(lines)] == [f"{metric}_scale_euler_20_steps"]


def test_a_scheme_without_a_scale_stands_in_every_panel(drawn):
    lines = [line("ip2p", scale, image, psnr=20.0) for scale in (1.0, 3.0) for image in (1.0, 2.0)]
    lines += [line("joint", scale, 1.0, psnr=21.0) for scale in (1.0, 3.0)]
    curves.make_curves([*lines, line("image_only", 1.0, 1.0, psnr=22.0)])
    [(panels, *_)] = drawn
    assert [*panels] == ["image guidance scale 1", "image guidance scale 2"]
    for panel in panels.values():
        points = {one.label: [(x, y.mean) for x, y in one.points] for one in panel}
        assert points["ip2p"] == [(1.0, 20.0), (3.0, 20.0)]
        assert points["joint"] == [(1.0, 21.0), (3.0, 21.0)]
    assert points == {"ip2p": points["ip2p"], "joint": points["joint"]}


def test_a_perfect_edit_and_one_without_scores_are_drawn_too():
    means = {"psnr": float("inf"), "ssim": 1.0, "change": 0.0}
    failed = replace(line("ip2p", 3.0, 1.0), evaluations=float("inf"))
    for scale in (1.0, 2.0):
        lines = [identity(**means), line("ip2p", 1.0, 1.0, **means), failed]
        assert curves.make_curves([*lines, line("ip2p", scale, 1.0, **means)])


def test_bars_reach_to_both_ends_of_the_interval():
    assert plots._bars(Estimate(20.0, 19.0, 22.0)) == (1.0, 2.0)
    assert plots._bars(Estimate(20.0)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("points", "count"),
    [
        ([(0.5, 0.5), (0.51, 0.5), (0.5, 0.51), (0.0, 0.0), (1.0, 1.0)], 5),
        ([(0.5, 0.5)] * 40, None),  # no room for all of them
    ],
)
def test_labels_of_near_points_do_not_cover_each_other(points, count):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o")
    plots.place_labels(axes, [(x, y, "1.5", "k") for x, y in points])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == count or (count is None and 4 <= len(boxes) < len(points))
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
