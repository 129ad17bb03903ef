"""The report: table, grids, curves, and one page that needs nothing else."""

import base64
import csv
import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from ipx2p.editing.settings import EditSettings
from ipx2p.eval import curves, tables
from ipx2p.eval.page import make_page
from ipx2p.eval.report import make_notes, note_of_choice
from ipx2p.eval.scores import METRICS, Results
from ipx2p.eval.tables import ALL, TRADE_OFF, Line, choose, columns_of, csv_of_lines, markdown
from ipx2p.files import FORMULA, csv_text
from tests.eval.conftest import SPECS, WEIGHTS, run, sweep


def line(guidance, scale, image_scale, evaluations=60, steps=20, sampler="euler", **means):
    settings = EditSettings(sampler, "linspace", steps, guidance, scale, image_scale)
    both = {name: means[name] for name in TRADE_OFF if name in means}
    return Line(settings, ALL, 2, evaluations, 1.5, means, trade_off=both)


def drawn_of(lines):
    """Curves, with the best scales chosen among these lines themselves."""
    return curves.make_curves(choose(lines, lines))


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


@pytest.mark.parametrize(
    ("spec", "scales", "effective"),
    [
        ("ip2p", (5.0, 1.5), (5, 1.5)),
        ("nested", (5.0, 1.5), (7.5, 1.5)),
        ("joint", (5.0, 1.5), (5, 5)),
        ("text_only", (5.0, 1.5), (5, 1)),
        ("free:null=-0.5,image=-3.5", (5.0, 1.5), (5, 1.5)),
        ("fdg:low=.3,high=.3", (5.0, 1.5), (2.2, 1.15)),
        ("fdg:low=0.5,high=0.5,on=text", (3.0, 1.5), (2, 1.5)),
        ("symmetric", (5.0, 1.5), None),
        ("symmetric", (0.5, 0.5), (1, 1)),
        ("text_first", (3.0, 3.0), (3, 3)),
        ("tcfg", (5.0, 1.5), None),
        ("interval+apg", (1.0, 1.0), (1, 1)),
        ("cfgpp", (1.0, 1.0), None),
        ("cads", (1.0, 1.0), None),
    ],
)
def test_effective_scales_are_those_at_which_ip2p_is_exactly_the_same(spec, scales, effective):
    cells = line(spec, *scales).cells()
    got = cells["effective_guidance_scale"], cells["effective_image_guidance_scale"]
    assert got == (effective or (None, None))


def test_columns_of_effective_scales_are_there_where_they_say_something():
    names = {"effective_guidance_scale", "effective_image_guidance_scale"}
    identity, plain, damped = Line(None, ALL, 2), line("ip2p", 3.0, 1.5), line("tcfg", 3.0, 1.5)
    assert not names & {*columns_of([identity, plain, damped])}
    assert names <= {*columns_of([identity, plain, line("nested", 3.0, 1.5)])}


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


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-5 degrees", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''-x", "it's", "'quoted'", ""],
)
def test_text_in_a_csv_is_no_formula_and_can_be_read_back(text):
    rows = [{"text": text, "number": -1.5, "none": None}]
    [row] = csv.DictReader(io.StringIO(csv_text([*rows[0]], rows), newline=""))
    assert not row["text"].startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert row["number"] == "-1.5" and row["none"] == ""
    written = row["text"]
    assert (written[1:] if written[:1] == "'" and FORMULA.match(written) else written) == text


@pytest.mark.usefixtures("no_curves")
def test_an_instruction_that_looks_like_a_formula_stays_text(tmp_path, coffee, capsys):
    coffee.save(tmp_path / "=a.png")
    argv = [*(WEIGHTS, "--device", "cpu", "--resolution", 16, "--steps", 1, "--grids", 0)]
    argv += ["--image", tmp_path / "=a.png", "--instruction", "@SUM(A1)", "--output"]
    code, _, err = run(capsys, *argv, tmp_path / "out")
    assert code == 0, err
    [edit] = csv.DictReader(io.StringIO((tmp_path / "out" / "edits.csv").read_text()))
    assert (edit["picture"], edit["instruction"]) == ("'=a", "'@SUM(A1)")


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
    assert (
        "python -m ipx2p.eval.compare" in text
        and "torch 2" in text
        and "ip2p at 1, 1" in page.values
    )


def test_what_people_type_is_escaped():
    text = make_page(
        [Line(None, ALL, 1), line("ip2p", 7.0, 1.5)],
        [("<b>cat</b>", 'cat" onload="x', b"")],
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


@pytest.mark.usefixtures("no_curves")
def test_only_as_many_pictures_get_grids_as_are_asked_for(copied, arguments, capsys):
    code, _, _ = run(capsys, *arguments, "--output", copied, "--grids", 1)
    assert code == 0
    names = [path.name for path in (copied / "grids").iterdir()]
    assert len(names) == len(SPECS) + 1 and all(name.startswith("a-snow") for name in names)


def test_what_is_not_there_is_said(finished, monkeypatch):
    text = (finished / "index.html").read_text()
    assert "No CLIP image similarity: needs a CLIP model (--clip)." in text
    monkeypatch.setattr("ipx2p.eval.report.has_matplotlib", lambda: True)
    nothing = Results([], None, None, None, None, 1)
    notes = make_notes(None, ["change"], nothing)
    assert [note[:16] for note in notes] == [
        *("No CLIP image si", "No PSNR and SSIM", "No CLIP directio")
    ]
    assert make_notes(["change"], ["change"], nothing) == []  # left out on purpose
    monkeypatch.setattr("ipx2p.eval.report.has_matplotlib", lambda: False)
    assert 'pip install -e ".[plots]"' in make_notes(["change"], ["change"], nothing)[0]


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
    sweep(
        *(WEIGHTS, "--manifest", folder / "pairs.jsonl", "--device", "cpu", "--clip", clip_folder),
        *("--output", folder / "out", "--resolution", 64, "--steps", 1),
        *("--sampler", "euler", "heun", "--guidance", "ip2p + tcfg", "--guidance-scale", 1, 3),
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
    assert tables.means_of(measured, TRADE_OFF, together=True) == measured[0]
    assert tables.means_of(measured, ["clip_image"]) == {"clip_image": pytest.approx(0.7)}
    names = sorted(path.name.rpartition("_")[0] for path in (odd / "curves").iterdir())
    assert "all_trade-off-euler-1-steps" in names and "z-i_psnr-evaluations" in names


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
    for guidance in ("ip2p", "fdg:low=0.5,high=0.5"):
        for scale in (3.0, 7.0):
            for image_scale in (1.0, 1.5, 2.0):
                means = dict.fromkeys(METRICS, 0.1 * scale + 0.05 * image_scale)
                lines.append(line(guidance, scale, image_scale, **means))
    return lines


def test_curves_of_everything_that_can_be_drawn():
    pytest.importorskip("matplotlib")
    drawn = {curve.name: curve for curve in drawn_of(full_lines())}
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
    drawn_of(lines)
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
    drawn_of(lines)
    handles, labels = legends[-1]
    assert labels[:2] == ["ip2p, euler", "ip2p, heun"]
    assert handles[0].get_linestyle() != handles[1].get_linestyle()


def test_points_stand_at_effective_scales_or_are_called_nominal(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(curves, "_panels", lambda panels, *axes, **_: drawn.append((panels, axes)))
    lines = [Line(None, ALL, 2, means={"clip_image": 1.0, "clip_direction": 0.0, "change": 0.0})]
    for spec in ("nested", "tcfg"):
        means = {"clip_image": 0.5, "clip_direction": 0.1}
        lines += [line(spec, scale, 1.5, change=scale, **means) for scale in (1.0, 2.0)]
    trade_off, _ = drawn_of(lines)
    [(trade_off_panels, _), (panels, axes)] = drawn
    assert [(one.label, one.texts) for [*panel] in trade_off_panels.values() for one in panel] == [
        *(("nested", ["1.5", "3"]), ("tcfg (nominal scale)", ["1", "2"]))
    ]
    assert [(one.label, one.points) for [*panel] in panels.values() for one in panel] == [
        ("nested", [(1.5, 1.0), (3.0, 2.0)]),
        ("tcfg (nominal scale)", [(1.0, 1.0), (2.0, 2.0)]),
    ]
    assert axes[0] == "effective guidance scale"
    assert "labelled by effective guidance scale" in trade_off.caption
    # Where all of them stand where they were set, nothing is said.
    drawn.clear()
    drawn_of([one for one in lines if one.settings is None or "tcfg" in one.place])
    assert drawn[1][1][0] == "guidance scale"
    assert [one.label for panel in drawn[1][0].values() for one in panel] == ["tcfg"]


def test_each_task_has_curves_of_its_own():
    """PSNR rises with the scale in one task and falls in the other: a mean of both is flat."""
    pytest.importorskip("matplotlib")
    lines = []
    for task, sign in ((ALL, 0), ("rise", 1), ("fall", -1)):
        lines.append(replace(Line(None, ALL, 1, means={"psnr": 20.0}), task=task))
        made = [line("ip2p", s, 1.0, psnr=20 + sign * s) for s in (1.0, 2.0)]
        lines += [replace(one, task=task) for one in made]
    drawn = drawn_of(lines)
    assert [curve.name.split("_")[:2] for curve in drawn] == [
        *(["rise", "psnr-scale-euler-20-steps"], ["rise", "psnr-evaluations"]),
        *(["fall", "psnr-scale-euler-20-steps"], ["fall", "psnr-evaluations"]),
    ]
    assert drawn[0].caption.startswith("rise: PSNR")
    assert len({curve.png for curve in drawn}) == 4


def test_best_scales_are_those_of_the_choosing_pictures():
    def lines(*numbers):
        made = [line("ip2p", s, 1.0, psnr=p) for s, p in zip((1.0, 2.0, 3.0), numbers, strict=True)]
        return [Line(None, ALL, 1, means={"psnr": 20.0}), *made]

    reported, choosing = lines(21.0, 22.0, 23.0), lines(9.0, 11.0, 10.0)
    assert [one.best for one in choose(reported, choosing)] == [(), (), ("psnr",), ()]
    assert [one.best for one in choose(reported, reported)] == [(), (), (), ("psnr",)]
    chosen = choose(reported, choosing)
    assert chosen[2].means == {"psnr": 22.0} and "best" in columns_of(chosen)
    assert "on the reported pictures themselves" in note_of_choice(chosen, None)[0]
    assert "chosen on val.jsonl" in note_of_choice(chosen, "val.jsonl")[0]
    alone = choose(reported[:2], reported[:2])
    assert note_of_choice(alone, None) == [] and "best" not in columns_of(alone)


def test_curves_are_drawn_for_the_metrics_that_were_asked_for():
    pytest.importorskip("matplotlib")
    for metric in ("psnr", "ssim", "change"):
        lines = [Line(None, ALL, 1, means={metric: 1.0})]
        lines += [line("ip2p", scale, 1.0, **{metric: scale}) for scale in (1.0, 2.0)]
        names = [curve.name for curve in drawn_of(lines)]
        assert names[0] == f"{metric}_scale_euler_20_steps"
        assert names[1:] == ([] if metric == "change" else [f"{metric}_evaluations"])


@pytest.mark.usefixtures("no_curves")
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


@pytest.mark.usefixtures("no_curves")
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
    assert drawn_of([identity, line("ip2p", 1.0, 1.0, **means)])


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
