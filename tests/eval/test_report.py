"""The report of records: what stands in it, and that it needs nothing else."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace

import pytest

from ipx2p.cli import run_command
from ipx2p.eval import grids, report, reporting
from ipx2p.eval.benchmarks.protocol import Protocol, PublishedRow
from ipx2p.eval.grids import MAX_TILES, draw_cases, make_grids, make_rows
from ipx2p.eval.lines import make_lines
from ipx2p.eval.records import Records, read_folders
from ipx2p.eval.reporting import write_report
from ipx2p.files import FORMULA, csv_text
from tests.eval.folders import brightened, settings_of, sharpened, write_folder

PHOTOS = ("cat", "bee", "moose", "castle", "drums")
SWEEP = [
    (guidance, scale, image_scale)
    for guidance in ("ip2p", "apg", "tcfg")
    for scale in (3.0, 5.0, 7.0)
    for image_scale in (1.0, 1.5)
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two models and a classical filter; tests must not change it. The second model is worse."""
    folder = tmp_path_factory.mktemp("run") / "out"
    edits = [
        ("classical", None, sharpened(50)),
        ("good", settings_of(), sharpened(100)),
        ("bad|<b>", settings_of(), brightened(0.5)),
    ]
    write_folder(folder, edits, photos=PHOTOS)
    write_report(folder, read_folders([folder]), None, 4)
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Three schemes of one model at 3 x 2 scales, two seeds."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    edits = [
        ("m", settings_of(guidance, scale, image), brightened(1 + scale / image / 10))
        for guidance, scale, image in SWEEP
    ]
    return write_folder(folder, edits, photos=("cat",), seeds=(3, 4))


@pytest.fixture
def plain(monkeypatch):
    """Reports without curves, which take longest to make."""
    monkeypatch.setattr(reporting, "has_matplotlib", lambda: False)


def run(capsys, *argv):
    """The command in this process: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: report.main([str(arg) for arg in argv]))
    return exit_.value.code or 0, *capsys.readouterr()


def rows_of(path):
    return [*csv.DictReader(io.StringIO(path.read_text()))]


def test_the_report_is_made_from_a_moved_folder_alone(finished, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished, moved)
    for made in ("index.html", "table.md", "table.csv", "table.tex", "edits.csv"):
        (moved / made).unlink()
    code, out, err = run(capsys, moved)
    assert code == 0, err
    assert out.split() == [str(moved / "table.md"), str(moved / "index.html")]
    for made in ("table.csv", "table.tex", "edits.csv"):
        assert (moved / made).read_text() == (finished / made).read_text()
    for made in ("table.md", "index.html"):  # where the records lie stands in the head
        text = (moved / made).read_text().replace(str(moved), str(finished))
        assert text == (finished / made).read_text()


@pytest.mark.usefixtures("plain")
def test_several_folders_make_one_report(finished, tmp_path, capsys):
    other = tmp_path / "other"
    write_folder(other, [("third", settings_of(), sharpened(70))], photos=PHOTOS)
    code, _, err = run(capsys, finished, other, "--output", tmp_path / "both", "--baseline", "good")
    assert code == 0, err
    lines = [row for row in rows_of(tmp_path / "both" / "table.csv") if row["task"] == "all"]
    assert [row["model"] for row in lines] == [
        *("identity", "oracle", "classical", "bad|<b>", "good", "third")
    ]
    text = (tmp_path / "both" / "index.html").read_text()
    assert "All pictures: differences from good" in text
    assert ", ".join(sorted([str(finished), str(other)])) in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{a}", "{a}"], "--output is required with several folders"),
        (["{a}", "--grids", "-1"], "--grids is -1"),
        (["nowhere"], "nowhere is not a folder"),
        (["{empty}"], "holds no records"),
        (["{a}", "--baseline", "goood"], "did you mean.*good|goood"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(argv, message, finished, tmp_path, capsys):
    places = {"a": finished, "empty": tmp_path}
    code, _, err = run(capsys, *(arg.format(**places) for arg in argv))
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert re.search(message, err), err


@pytest.mark.usefixtures("plain")
def test_a_picture_that_is_gone_is_named(finished, tmp_path, capsys):
    moved = tmp_path / "out"
    shutil.copytree(finished, moved)
    shutil.rmtree(moved / "edits")
    code, _, err = run(capsys, moved)
    assert code == 2 and re.search(r"edits/\w+\.png: cannot be read", err), err
    code, _, err = run(capsys, moved, "--grids", 0)  # numbers alone need no pictures
    assert code == 0, err


@pytest.mark.usefixtures("plain")
def test_what_an_earlier_report_showed_is_removed(swept, tmp_path):
    for folder in ("grids", "curves"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "old.jpg").touch()
    write_report(tmp_path, swept, None, 1)
    assert not [*(tmp_path / "curves").iterdir()]
    names = sorted(path.name for path in (tmp_path / "grids").iterdir())
    assert len(names) == 2 and "old.jpg" not in names  # two seeds


def test_the_head_tells_what_was_compared_and_how(finished):
    text = (finished / "table.md").read_text()
    for told in (
        "- models: good: weights/mine, abc123; bad\\|&lt;b>: weights/mine, abc123",
        "- pictures: 5 in 10 cases; ",
        "- resolution: 48\n",
        "- guidance scale: 7\n",
        "- sampler: euler\n",
        "- seeds: 0\n",
        "- computed on: cpu (Tiny CPU, 1 threads), float32, in batches of 2\n",
        "- versions: ipx2p 0.1, torch 2.9, Python 3.11\n",
    ):
        assert told in text, text
    assert "effective" not in text


def test_what_measured_the_scores_is_named(swept):
    how = {"lpips": "AlexNet, 1234", "clip_image": "CLIP of B", "clip_text": "CLIP of B"}
    records = [replace(record, scored_by=how) for record in swept]
    about = reporting.about_of(records, make_lines(records))
    assert about["measured by"] == "lpips: AlexNet, 1234; clip_image, clip_text: CLIP of B"


def test_a_model_that_is_no_better_than_doing_nothing_is_named_in_words(finished):
    for name, model in (("table.md", "bad\\|&lt;b>"), ("index.html", "bad|&lt;b&gt;")):
        text = (finished / name).read_text()
        assert re.search(rf"{re.escape(model)}: does not beat identity by PSNR", text)


def test_words_about_scales_that_are_not_the_best_stand_back(swept):
    lines = [replace(line, remarks=("r",)) for line in make_lines(swept) if line.settings]
    remarks, lesser = reporting.remarks_of(lines)
    assert len(remarks) == sum(bool(line.best) for line in lines) and lesser
    assert len(remarks) + len(lesser) == len(lines)


def test_what_is_missing_or_hardly_compares_is_said(swept, monkeypatch):
    odd = [*swept]
    odd[-1] = replace(odd[-1], picture=None, scores={})
    odd[-2] = replace(odd[-2], scores={"psnr": 1.0}, made_with={"resolution": 7})
    notes = reporting.notes_of(odd, [], [])
    assert f"1 of {len(odd)} edits are not finite, and are in no mean." in notes
    there = len(odd) - 1
    assert any(f"SSIM: measured on {there - 1} of {there} edits" in note for note in notes)
    assert any("different resolutions (48, 7)" in note for note in notes)
    asked = [
        replace(record, scored_by=dict.fromkeys(("psnr", "outside_ssim"), "")) for record in odd
    ]
    [note] = [note for note in reporting.notes_of(asked, [], []) if "Not defined" in note]
    assert note.startswith("Not defined for any of these edits: SSIM outside. They lack")
    monkeypatch.setattr(reporting, "has_matplotlib", lambda: False)
    assert 'pip install -e ".[plots]"' in reporting.notes_of(swept, [], [])[-1]


@pytest.mark.usefixtures("plain")
def test_published_rows_stand_beside_ours_with_their_source_and_notes(tmp_path, monkeypatch):
    row = PublishedRow("theirs", {"psnr": 30.0, "judged": 4.5}, "a paper, table 1")
    made = Protocol("toy", "A toy.", None, ("psnr", "judged"), notes=("Crops do not compare.",))
    monkeypatch.setattr(Protocol, "published", property(lambda self: [row]))
    monkeypatch.setattr(reporting, "PROTOCOLS", {"toy": made})
    edits = [("mine", settings_of(), sharpened(100))]
    records = write_folder(tmp_path, edits, tasks=("deblur",), benchmark="toy")
    lines = make_lines(records)
    [table] = reporting.published_tables(records, lines)
    assert table.title == "toy, beside published rows" and "Crops do not compare." in table.about
    assert table.heads == ["model", "PSNR, dB", "judged score", "from"]
    cells = [[cell.text for cell in cells] for cells in table.rows]
    assert [row[0] for row in cells] == ["identity", "oracle", "mine", "theirs"]
    assert cells[-1] == ["theirs", "30.00", "4.50", "a paper, table 1"]
    assert cells[1][1] == "inf" and cells[1][3] == "this report"  # the check of our measure
    write_report(tmp_path, records, None, 4)
    assert "a paper, table 1" in (tmp_path / "index.html").read_text()
    assert "| theirs | 30.00 | 4.50 | a paper, table 1 |" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("plain")
def test_answers_of_a_judge_are_scores_and_tasks_count_the_same(tmp_path, capsys):
    edits = [("mine", settings_of(), sharpened(100))]
    given = {"photos": ("cat", "bee"), "tasks": ("deblur", "brighten"), "benchmark": "imgedit"}
    write_folder(tmp_path, edits, **given)
    records = [*read_folders([tmp_path])]
    records = [r for r in records if (r.case["name"], r.model) != ("bee-deblur", "mine")]
    lines = [
        {"id": f"{r.key}/edit", "answer": {"score": [5 if r.case["task"] == "deblur" else 2] * 3}}
        for r in records
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = run(capsys, tmp_path, "--answers", answers)
    assert code == 2 and "lacks 1 of 12 answers" in err
    [lacking] = {r.key for r in read_folders([tmp_path])} - {r.key for r in records}
    with open(answers, "a") as file:
        file.write(json.dumps({"id": f"{lacking}/edit", "answer": None}) + "\n")
    code, _, err = run(capsys, tmp_path, "--answers", answers)
    assert code == 0, err
    scored = read_folders([tmp_path])  # with the scores, for later reports
    assert {r.scores.get("judged") for r in scored} == {5.0, 2.0, None}
    [table] = reporting.published_tables(scored, make_lines(scored))
    [mine] = [row for row in table.rows if (row[0].text, row[1].text) == ("all", "mine")]
    assert mine[table.heads.index("judged score")].value == pytest.approx(3.5)  # (5 + 2) / 2


def test_pictures_are_drawn_from_all_tasks_and_photographs(finished):
    records = read_folders([finished])
    drawn = draw_cases(records, 4)
    cases = [mine[0].case for mine in drawn]
    assert len({case["group"] for case in cases}) == 4
    assert sorted(case["task"] for case in cases) == ["brighten"] * 2 + ["deblur"] * 2
    assert draw_cases(records, 4) == drawn and len(draw_cases(records, 99)) == 10


def test_a_row_has_source_models_and_target(finished):
    records = read_folders([finished])
    mine = draw_cases(records, 1)[0]
    [(title, tiles)] = make_rows(mine, make_lines(records)).items()
    assert [tile.label for tile in tiles] == ["source", "classical", "bad|<b>", "good", "target"]
    assert not title and all(tile.path.is_file() for tile in tiles)
    assert re.fullmatch(r"PSNR [\d.]+, SSIM [\d.]+, change [\d.]+", tiles[1].note)


def test_schemes_stand_at_equal_scales_and_at_equal_change(swept):
    mine = draw_cases(swept, 1)[0]
    rows = make_rows(mine, make_lines(swept))
    assert len(SWEEP) > MAX_TILES
    first, scales, change, *best = rows
    assert [tile.label for tile in rows[first]] == ["source", "target"]
    assert scales == "At equal scales" and change.startswith("At equal measured change, ")
    assert len({tile.label.partition(", ")[2] for tile in rows[scales]}) == 1
    assert [len(rows[title]) for title in rows] == [2] + [3] * (len(rows) - 1)
    assert best == ["At the best scales by PSNR, dB", "At the best scales by SSIM"]
    few = [record for record in mine if (record.settings or {}).get("guidance") != "tcfg"]
    rows = make_rows(few, make_lines(few))
    assert [len(tiles) for tiles in rows.values()] == [2 + 12, 2, 2]  # all of them, and in pairs


def test_an_edit_that_is_not_finite_has_a_tile_without_a_picture(tmp_path):
    edits = [("broken", settings_of(), None), ("good", settings_of(), sharpened(9))]
    records = write_folder(tmp_path, edits, photos=("cat",), tasks=("deblur",))
    [tiles] = make_rows(records, make_lines(records)).values()
    assert [tile.path is None for tile in tiles] == [False, False, True, False]


def test_sheets_have_a_column_for_each_scale_and_a_row_for_each_scheme_and_image_scale(
    swept, monkeypatch
):
    mine, sheets = draw_cases(swept, 1)[0], []
    monkeypatch.setattr(grids, "contact_sheet", lambda rows, **how: sheets.append((rows, how)))
    assert len([*make_grids(mine)]) == len(sheets) == 2  # of each seed
    rows, how = sheets[0]
    scales = [f"guidance scale {scale}" for scale in (3, 5, 7)]
    assert how["column_labels"] == ["source", "target", *scales]
    assert how["row_labels"][:3] == [
        *("ip2p, image guidance scale 1", "ip2p, image guidance scale 1.5"),
        "apg, image guidance scale 1",
    ]
    assert [len(row) for row in rows] == [5] * 6
    assert all(rows[0][:2] == row[:2] and None not in row for row in rows)


def test_models_with_one_setting_each_have_no_sheets(finished):
    assert [*make_grids(draw_cases(read_folders([finished]), 1)[0])] == []


def test_records_that_select_are_in_no_table_and_no_picture(tmp_path, plain):
    edits = [("m", settings_of(scale=s), sharpened(50 * s)) for s in (1.0, 2.0)]
    records = write_folder(tmp_path / "a", edits, photos=("cat",), tasks=("deblur",))
    others = write_folder(tmp_path / "b", edits, photos=("bee",), tasks=("deblur",))
    others = [replace(record, selects=True) for record in others if record.settings]
    write_report(tmp_path, [*records, *others], None, 4)
    text = (tmp_path / "index.html").read_text()
    assert "Best scales were chosen on 1 other" in text and "bee" not in text
    assert {row["name"] for row in rows_of(tmp_path / "edits.csv")} == {"cat-deblur"}
    assert len(rows_of(tmp_path / "chosen_on.csv")) == 2


def test_names_that_are_no_text_are_written_escaped(tmp_path, plain):
    edits = [("m\udcff", settings_of(), sharpened(9))]
    write_report(tmp_path / "out", write_folder(tmp_path / "a", edits, photos=("cat",)), None, 4)
    assert r"m\udcff" in (tmp_path / "out" / "table.md").read_text()


def test_a_folder_that_is_read_twice_counts_once(finished):
    assert len(read_folders([finished, finished])) == len(Records(finished).by_key)


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
