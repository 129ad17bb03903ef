"""The report: table, grids, curves, and one page that needs nothing else."""

import base64
import csv
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

import ipx2p.eval.compare
from ipx2p.editing.settings import EditSettings
from ipx2p.eval import curves, tables
from ipx2p.eval.page import Grid, make_page
from ipx2p.eval.report import make_notes
from ipx2p.eval.scores import METRICS
from ipx2p.eval.tables import ALL, TRADE_OFF, Line, columns_of, csv_of_lines, markdown
from tests.eval.conftest import SPECS, WEIGHTS, run

HALF = "fdg:low=0.5,high=0.5"  # exactly half the push


def line(guidance, scale, image_scale, evaluations=60, steps=20, sampler="euler", **means):
    settings = EditSettings(sampler, "linspace", steps, guidance, scale, image_scale)
    both = {name: means[name] for name in TRADE_OFF if name in means}
    return Line(settings, ALL, 2, evaluations, 1.5, means, trade_off=both)


def table_of(folder):
    return [*csv.DictReader(io.StringIO((folder / "table.csv").read_text()))]


def test_the_table_has_means_over_pictures_evaluations_and_identity(finished):
    lines = [one for one in table_of(finished) if one["task"] == "all"]
    assert len(lines) == 1 + 12
    identity = lines[0]
    assert identity["guidance"] == "identity" and float(identity["change"]) == 0
    edits = [*csv.DictReader(io.StringIO((finished / "edits.csv").read_text()))]
    assert len(edits) == 24
    for one in lines[1:]:
        same = [
            edit
            for edit in edits
            if all(edit[n] == one[n] for n in ("guidance", "guidance_scale"))
            and edit["image_guidance_scale"] == one["image_guidance_scale"]
        ]
        assert len(same) == int(one["edits"]) == 2
        for name in ("psnr", "ssim", "change", "evaluations", "seconds"):  # of two: the median
            mean = sum(float(edit[name]) for edit in same) / 2
            assert float(one[name]) == pytest.approx(mean)
    evaluations = [float(one["evaluations"]) for one in lines[1:]]
    assert evaluations == sorted(evaluations) and {*evaluations} == {2, 4, 6}


def test_each_task_has_its_own_lines_with_its_own_identity(finished):
    lines = table_of(finished)
    assert [len([one for one in lines if one["task"] == task]) for task in ("snow", "night")] == [
        *(13, 13)
    ]
    identities = [one for one in lines if one["guidance"] == "identity"]
    assert [(one["task"], one["edits"]) for one in identities] == [
        *(("all", "2"), ("snow", "1"), ("night", "1"))
    ]


def test_the_damped_scheme_stands_at_its_effective_scale():
    lines = [Line(None, ALL, 2), line("ip2p", 3.0, 1.5), line(f"{HALF},on=text", 3.0, 1.5)]
    lines += [line(HALF, 3.0, 1.5), line("tcfg", 3.0, 1.5)]
    names = ["effective_guidance_scale", "effective_image_guidance_scale"]
    effective = [tuple(one.cells()[name] for name in names) for one in lines]
    assert effective == [(None, None), (3, 1.5), (2, 1.5), (2, 1.25), (None, None)]
    assert {*names} <= {*columns_of(lines)} and not {*names} & {*columns_of(lines[:2])}


def test_schemes_at_equal_evaluations_stand_beside_each_other():
    lines = [Line(None, ALL, 1), line("apg", 7.0, 1.5, 40), line("ip2p", 7.0, 1.5, 40)]
    lines.append(line("pag", 7.0, 1.5, 80))
    text = markdown(lines)
    parts = text.split("### ")[1:]
    assert [part.splitlines()[0] for part in parts] == [
        "40 network evaluations per edit",
        "80 network evaluations per edit",
    ]
    assert [part.count("| identity |") for part in parts] == [1, 1]
    assert "| apg |" in parts[0] and "| ip2p |" in parts[0] and "| pag |" in parts[1]


def test_csv_names_its_columns_as_the_code_does():
    head, first = csv_of_lines([line("ip2p", 7.0, 1.5, psnr=20.123456789)]).splitlines()
    assert head.startswith("task,guidance,guidance_scale,image_guidance_scale,effective_guidance_")
    assert "20.123456789" in first


class References(HTMLParser):
    """Everything a page points to, its cells, and its pictures."""

    def __init__(self):
        super().__init__()
        self.links, self.values, self.rows = [], [], 0

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href", "srcset", "data") if name in attrs]
        self.rows += tag == "tr"
        if "data-value" in attrs:
            self.values.append(attrs["data-value"])


def test_the_page_holds_everything_and_points_nowhere(finished):
    text = (finished / "index.html").read_text()
    page = References()
    page.feed(text)
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?://|url\(|@import|<link", text)
    for link in page.links:
        kind, _, data = link.partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        image.load()
        assert kind == f"data:image/{image.format.lower()}"
    grids = [*(finished / "grids").iterdir()]
    assert len(grids) == 2 * (len(SPECS) + 1)  # two pictures: each scheme, and all of them
    drawn = [*(finished / "curves").glob("*.png")]
    assert len(page.links) == len(grids) + len(drawn)


def test_the_page_lists_every_line_with_units_command_and_versions(finished):
    text = (finished / "index.html").read_text()
    page = References()
    page.feed(text)
    lines = table_of(finished)
    assert page.rows == len(lines) + 1
    for one in lines:
        assert one["guidance"] in page.values
    for told in ("PSNR, dB", "seconds per edit", "network evaluations per edit", "change, %"):
        assert f"<th>{told}</th>" in text
    assert "python -m ipx2p.eval.compare" in text and "torch 2" in text and "effective" in text


def test_what_people_type_is_escaped():
    text = make_page(
        [Line(None, ALL, 1), line("ip2p", 7.0, 1.5)],
        [Grid("<b>cat</b>", 'cat" onload="x', b"")],
        [],
        {"command": "<script>alert(1)</script>"},
        [],
    )
    assert "<script>alert" not in text and "<b>cat" not in text and '" onload="' not in text


def test_grids_have_a_column_for_each_scale(finished):
    names = sorted(path.name for path in (finished / "grids").iterdir())
    assert sum("_schemes_" in name for name in names) == 2
    scheme = next(name for name in names if name.startswith("a-snow_ip2p"))
    with Image.open(finished / "grids" / scheme) as sheet:
        assert sheet.width > 4 * 128 and sheet.height > 2 * 128  # source, target, 2 x 2 scales


def test_only_as_many_pictures_get_grids_as_are_asked_for(copied, arguments, capsys):
    code, _, _ = run(capsys, *arguments, "--output", copied, "--grids", 1)
    assert code == 0
    names = [path.name for path in (copied / "grids").iterdir()]
    assert len(names) == len(SPECS) + 1 and all(name.startswith("a-snow") for name in names)


def test_what_is_not_there_is_said(finished, monkeypatch):
    text = (finished / "index.html").read_text()
    assert "No CLIP columns: name a CLIP model with --clip" in text
    nothing = ([], None, None, None)
    monkeypatch.setattr("ipx2p.eval.report.has_matplotlib", lambda: True)
    assert make_notes(None, [*METRICS], *nothing) == []
    assert [note[:14] for note in make_notes(None, ["change"], *nothing)] == [
        *("No CLIP column", "No PSNR and SS")
    ]
    assert "source_caption" in make_notes(None, ["psnr", "clip_image"], *nothing)[0]
    assert make_notes(["change"], ["change"], *nothing) == []  # left out on purpose
    monkeypatch.setattr("ipx2p.eval.report.has_matplotlib", lambda: False)
    assert 'pip install -e ".[plots]"' in make_notes(None, [*METRICS], *nothing)[0]


@pytest.fixture(scope="module")
def odd(tmp_path_factory, clip_folder, coffee):
    """A sweep of pairs that lack something, in a folder of its own."""
    folder = tmp_path_factory.mktemp("odd")
    coffee.save(folder / "a.png")
    coffee.resize((300, 20)).save(folder / "narrow.png")
    coffee.rotate(90).save(folder / "b.png")
    captions = {"source_caption": "a cup", "target_caption": "a <b>cup</b> | in snow"}
    lines = [
        {"source": "a.png", "target": "b.png", "task": "all"} | captions,
        {"source": "a.png", "target": "a.png", "task": "z|<i>"} | captions,
        {"source": "narrow.png", "target": "narrow.png", "task": "z|<i>"},
    ]
    text = "\n".join(json.dumps(line | {"instruction": "snow"}) for line in lines)
    (folder / "pairs.jsonl").write_text(text)
    ipx2p.eval.compare.main(
        [
            *(str(WEIGHTS), "--manifest", str(folder / "pairs.jsonl"), "--device", "cpu"),
            *("--output", str(folder / "out"), "--resolution", "64", "--steps", "1"),
            *(
                "--sampler",
                "euler",
                "heun",
                "--guidance",
                "ip2p + tcfg",
                "--clip",
                str(clip_folder),
            ),
            *("--guidance-scale", "1", "3"),
        ]
    )
    return folder / "out"


def test_pictures_that_lack_something_are_counted_and_said(odd):
    text = (odd / "table.md").read_text()
    for note in (
        "SSIM of 2 of 3 pictures: the others have no target, or are too small.",
        "CLIP direction similarity of 2 of 3 pictures: the others have no captions.",
    ):
        assert note in text and note in (odd / "index.html").read_text()
    edits = [*csv.DictReader(io.StringIO((odd / "edits.csv").read_text()))]
    assert len(edits) == 3 * 4
    for edit in edits:
        assert (edit["ssim"] == "") == edit["source"].endswith("narrow.png")
    # An edit that two pairs share stands under the name and task of each, as it was typed.
    assert {edit["task"] for edit in edits if edit["source"].endswith("a.png")} == {"all", "z|<i>"}
    assert {edit["guidance"] for edit in edits} == {"ip2p + tcfg"}


def test_a_task_may_be_called_all_and_tables_show_what_was_typed(odd):
    lines = table_of(odd)
    assert [line["edits"] for line in lines if line["guidance"] == "identity"] == ["3", "1", "2"]
    assert len([line for line in lines if line["task"] == "all"]) == 2 * 5
    text = (odd / "table.md").read_text()
    assert r"z\|&lt;i>" in text and "<i>" not in text


def test_the_source_unchanged_has_no_direction(odd):
    for line in table_of(odd):
        if line["guidance"] == "identity":
            assert float(line["clip_direction"]) == 0 and float(line["clip_image"]) <= 1


def test_the_trade_off_is_of_the_pictures_that_have_captions(odd):
    pytest.importorskip("matplotlib")
    measured = [{"clip_direction": 0.1, "clip_image": 0.5}, {"clip_image": 0.9}]
    assert tables._trade_off(measured) == {"clip_direction": 0.1, "clip_image": 0.5}
    names = sorted(path.name for path in (odd / "curves").iterdir())
    assert "trade_off_euler_1_steps.png" in names and "psnr_evaluations.png" in names


@pytest.mark.parametrize("metrics", [["clip_direction"], ["clip_image"], ["ssim", "change"]])
def test_any_choice_of_metrics_is_reported(odd, metrics, clip_folder, capsys, tmp_path):
    out = shutil.copytree(odd, tmp_path / "out")
    asked = (out / "table.md").read_text().split("- command: python -m ipx2p.eval.compare ")[1]
    argv = shlex.split(asked.splitlines()[0])
    argv[argv.index("--output") + 1] = str(out)
    code, _, err = run(capsys, *argv, "--grids", 0, "--metrics", *metrics)
    assert code == 0, err
    assert "No CLIP" not in (out / "table.md").read_text()


def full_lines():
    """Two schemes at 2 x 3 scales with every metric."""
    lines = [Line(None, ALL, 1, means=dict.fromkeys(METRICS, 0.5))]
    for guidance in ("ip2p", HALF):
        for scale in (3.0, 7.0):
            for image_scale in (1.0, 1.5, 2.0):
                means = dict.fromkeys(METRICS, 0.1 * scale + 0.05 * image_scale)
                lines.append(line(guidance, scale, image_scale, **means))
    return lines


def test_curves_of_everything_that_can_be_drawn():
    pytest.importorskip("matplotlib")
    drawn = {curve.name: curve for curve in curves.make_curves(full_lines())}
    how = "euler_20_steps"
    assert [*drawn] == [
        f"trade_off_{how}",
        f"psnr_scale_{how}",
        f"ssim_scale_{how}",
        "psnr_evaluations",
        "ssim_evaluations",
    ]
    for curve in drawn.values():
        assert Image.open(io.BytesIO(curve.png)).width > 600
    assert "labelled by effective image guidance scale" in drawn[f"trade_off_{how}"].caption


def test_the_trade_off_has_the_axes_of_the_paper(monkeypatch):
    """Fig. 8 of InstructPix2Pix: direction similarity to the right, image similarity upwards."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(curves, "_place_labels", lambda axes, labels: drawn.append((axes, labels)))
    lines = [Line(None, ALL, 2, means={"clip_image": 1.0, "clip_direction": 0.0})]
    for spec in ("ip2p", "joint"):
        for scale in (1.0, 2.0) if spec == "ip2p" else (1.0,):
            means = {"clip_image": 0.7 + 0.1 * scale, "clip_direction": 0.3 - 0.1 * scale}
            lines.append(line(spec, 7.0, scale, **means))
    curves.make_curves(lines)
    [(axes, labels)] = [(axes, labels) for axes, labels in drawn if labels]
    assert axes.get_xlabel() == "CLIP direction similarity"
    assert axes.get_ylabel() == "CLIP image similarity"
    # A scheme without image guidance scale is one point, without a label.
    assert [(x, y, text) for x, y, text, _ in labels] == [
        (pytest.approx(0.2), pytest.approx(0.8), "1"),
        (pytest.approx(0.1), pytest.approx(0.9), "2"),
    ]
    assert [len(drawn.get_xdata()) for drawn in axes.lines] == [2, 1]


def test_samplers_have_lines_of_their_own_against_evaluations(monkeypatch):
    pytest.importorskip("matplotlib")
    legends = []
    legend = "matplotlib.figure.Figure.legend"
    monkeypatch.setattr(
        legend, lambda self, handles, labels, **_: legends.append((handles, labels))
    )
    lines = [Line(None, ALL, 1, means={"psnr": 20.0})]
    for sampler in ("euler", "heun"):
        lines += [line("ip2p", 1.0, 1.0, cost, sampler=sampler, psnr=cost) for cost in (1, 2)]
    curves.make_curves(lines)
    handles, labels = legends[-1]
    assert labels[:2] == ["ip2p, euler", "ip2p, heun"]
    assert handles[0].get_linestyle() != handles[1].get_linestyle()


def test_points_of_the_trade_off_stand_at_effective_scales(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(curves, "_place_labels", lambda axes, labels: drawn.extend(labels))
    lines = [Line(None, ALL, 2, means={"clip_image": 1.0, "clip_direction": 0.0})]
    lines += [line(HALF, 7.0, s, clip_image=s / 4, clip_direction=0.1) for s in (1.0, 2.0)]
    [trade_off, *_] = curves.make_curves(lines)
    assert [text for _, _, text, _ in drawn if text] == ["1", "1.5"]
    assert "labelled by effective image guidance scale" in trade_off.caption


def test_curves_are_drawn_for_the_metrics_that_were_asked_for():
    pytest.importorskip("matplotlib")
    for metric in ("psnr", "ssim", "change"):
        lines = [Line(None, ALL, 1, means={metric: 1.0})]
        lines += [line("ip2p", scale, 1.0, **{metric: scale}) for scale in (1.0, 2.0)]
        names = [curve.name for curve in curves.make_curves(lines)]
        assert names[0] == f"{metric}_scale_euler_20_steps"
        assert names[1:] == ([] if metric == "change" else [f"{metric}_evaluations"])


def test_a_scheme_without_a_scale_has_one_line_and_stands_in_every_panel(
    arguments, tmp_path, capsys
):
    out = tmp_path / "out"
    asked = ["--guidance", "ip2p", "joint", "image_only", "--grids", 1]
    code, _, err = run(capsys, *arguments, *asked, "--output", out)
    assert code == 0, err
    lines = [one for one in table_of(out) if one["task"] == "snow"]
    scales = [
        (one["guidance_scale"], one["image_guidance_scale"])
        for name in ("joint", "image_only")
        for one in lines
        if one["guidance"] == name
    ]
    assert sorted(scales[:2]) == [("1.0", ""), ("3.0", "")]
    assert sorted(scales[2:]) == [("", "1.0"), ("", "2.0")]
    spread = curves._at_all_values(
        [line("ip2p", 3.0, 1.0), line("ip2p", 3.0, 2.0), line("joint", 3.0, 1.0)]
    )
    assert [curves._scales(one) for one in spread] == [(3, 1), (3, 2)] * 2
    sheets = sorted(path.name for path in (out / "grids").iterdir())
    assert len(sheets) == 4 and any("schemes" in name for name in sheets)


def test_seconds_are_medians_and_say_what_they_were_measured_on(copied, arguments, capsys):
    rows = copied / "edits_000.jsonl"
    found = [json.loads(text) for text in rows.read_text().splitlines()]
    for number, row in enumerate(found):
        row["seconds"] = 1000.0 if number == 0 else 1.0
        if number == 1:
            row |= {"batch_size": 7, "compiled": True}
    rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    code, _, err = run(capsys, *arguments, "--output", copied, "--grids", 0)
    assert code == 0, err
    about = (copied / "table.md").read_text()
    assert "in batches of 2; " in about and "float32, compiled, in batches of 7" in about
    assert "(seconds of different ones do not compare)" in about


def test_curves_of_one_setting_or_of_a_perfect_edit_are_drawn_too():
    pytest.importorskip("matplotlib")
    means = {"psnr": float("inf"), "ssim": 1.0, "change": 0.0}
    identity = Line(None, ALL, 1, means=means)
    assert curves.make_curves([identity, line("ip2p", 1.0, 1.0, **means)])


@pytest.mark.parametrize(
    ("points", "count"),
    [
        ([(0.5, 0.5), (0.51, 0.5), (0.5, 0.51), (0.0, 0.0), (1.0, 1.0)], 5),
        ([(0.5, 0.5)] * 40, None),  # no room for all of them
    ],
)
def test_labels_of_near_points_do_not_cover_each_other(points, count):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o")
    curves._place_labels(axes, [(x, y, "1.5", "k") for x, y in points])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == count or (count is None and 4 <= len(boxes) < len(points))
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_record_of_a_sweep_says_what_it_was_made_with(finished):
    record = json.loads((finished / "sweep.json").read_text())
    assert record["resolution"] == 16 and record["dtype"] == "float32"
