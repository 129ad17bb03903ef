"""Tables from records: lines, references, choices, words, and every format."""

import csv
import io
import itertools
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ipx2p.errors import InputError
from ipx2p.eval.intervals import Difference, Estimate
from ipx2p.eval.lines import ALL, Line, has_choice, make_lines
from ipx2p.eval.plots import pareto
from ipx2p.eval.records import Record
from ipx2p.eval.reporting import about_of, notes_of
from ipx2p.eval.scores import METRICS
from ipx2p.eval.tables import (
    cell,
    columns_of,
    common_settings,
    csv_of_edits,
    csv_of_lines,
    escaped,
    latex,
    markdown,
    match_change,
    tables_of,
    tables_of_match,
    values_of,
)

CPU = {"device": "cpu", "device_name": "Some CPU", "threads": 2, "dtype": "float32"}
CPU |= {"compiled": False, "batch_size": 4, "batch_branches": True}


def settings_of(guidance="ip2p", scale=7.0, image=1.5, sampler="euler", steps=20):
    return {
        "sampler": sampler,
        "spacing": "linspace",
        "num_steps": steps,
        "guidance": guidance,
        "guidance_scale": scale,
        "image_guidance_scale": image,
        "guidance_in_full": guidance,
        "effective_guidance_scale": scale,
        "effective_image_guidance_scale": image,
    }


def record(number, model, settings=None, task="", seed=None, weights=None, **more):
    """Of case `number`, in a folder of its own; more: fields of `Record`, or scores."""
    scores = {name: more.pop(name) for name in [*more] if name in METRICS}
    case = {"name": f"c{number}", "group": f"g{number}", "task": task, "instruction": "snow"}
    case |= {"source": f"/photos/{number}.png", "target": None, "benchmark": ""}
    made_with = {"weights_digest": weights or f"of {model}"} if settings else {}
    key = json.dumps([case, model, settings, seed, made_with])
    fields = {
        "key": key,
        "edit": key,
        "picture": {"file": "a.png", "digest": "d", "width": 8, "height": 8},
        **more,
    }
    if settings:
        fields = {"evaluations": 60, "seconds": 1.5, "computed_on": CPU, **fields}
    return Record(
        **{"case": case, "model": model, "settings": settings, "seed": seed, **fields},
        made_with=made_with,
        scores=scores,
    )


def rows_of(model, values, settings=None, metric="psnr", **more):
    """A record for each value."""
    return [record(n, model, settings, **{metric: v}, **more) for n, v in enumerate(values)]


def by_label(lines, task=ALL):
    return {line.label: line for line in lines if line.task == task}


GENERATOR = random.Random(0)
SOURCE = [GENERATOR.gauss(20, 3) for _ in range(12)]


def moved(by, spread=0.1):
    return [value + GENERATOR.gauss(by, spread) for value in SOURCE]


def three_models():
    """One better than identity, one worse, one that cannot be told from it; and a classical row."""
    plain = settings_of()
    return [
        *rows_of("identity", SOURCE),
        *rows_of("oracle", [math.inf] * 12),
        *rows_of("classical", moved(1, 0.01)),
        *rows_of("better", moved(2), plain, seed=0),
        *rows_of("worse", moved(-1), plain, seed=0),
        *rows_of("unclear", moved(0.02, 1), plain, seed=0),
    ]


def test_a_model_that_beats_identity_and_classical_gets_no_remark_and_others_get_words():
    lines = by_label(make_lines(three_models()))
    assert [*lines] == ["identity", "oracle", "classical", "better", "unclear", "worse"]
    assert lines["better"].remarks == lines["identity"].remarks == ()
    number = r"[+-]\d+\.\d\d"
    spread = rf"\({number} dB, {number} to {number}\)"
    [said, classical] = lines["worse"].remarks
    assert re.fullmatch(rf"does not beat identity by PSNR {spread}", said)
    assert re.fullmatch(rf"does not beat classical by PSNR {spread}", classical)
    assert re.fullmatch(
        rf"not shown to beat identity by PSNR {spread}", lines["unclear"].remarks[0]
    )


def test_lower_is_better_in_words_and_in_wins():
    metric = next((name for name in METRICS if METRICS[name].better < 0), None)
    if metric is None:
        pytest.skip("no such metric")
    lines = by_label(
        make_lines(
            rows_of("identity", [0.5] * 8, metric=metric)
            + rows_of("a", [0.3 + 0.01 * n for n in range(8)], settings_of(), metric=metric)
        )
    )
    one = lines["a"].against["identity"][metric]
    assert (one.wins, one.losses) == (8, 0) and one.high < 0
    assert lines["a"].remarks == ()


def test_nothing_is_said_of_metrics_that_do_not_choose_or_of_what_is_not_there():
    records = rows_of("identity", [0.0] * 8, metric="change")
    records += rows_of("a", [5.0] * 8, settings_of(), metric="change")
    assert all(line.remarks == () for line in make_lines(records))


def test_two_copies_of_a_model_differ_by_exactly_zero():
    values = moved(1)
    records = rows_of("identity", SOURCE) + rows_of("a", values, settings_of(), seed=0)
    records += rows_of("b", values, settings_of(), seed=0)
    lines = by_label(make_lines(records, baseline="a"))
    assert lines["b"].against["a"]["psnr"] == Difference(0.0, 0.0, 0.0, 0, 12, 0)
    assert [*lines["a"].against] == ["identity"] and [*lines["b"].against] == ["a", "identity"]
    mine = lines["b"].scores["psnr"]
    assert mine == lines["a"].scores["psnr"] and mine.low < mine.mean < mine.high


def test_seeds_are_not_samples_and_one_picture_has_no_interval():
    records = rows_of("identity", [20.0])
    records += [record(0, "a", settings_of(), seed=seed, psnr=20.0 + seed) for seed in range(50)]
    line = by_label(make_lines(records))["a"]
    assert line.scores["psnr"] == Estimate(44.5)
    assert line.against["identity"]["psnr"] == Difference(24.5, None, None, 1, 0, 0)
    assert line.remarks == ("not shown to beat identity by PSNR (+24.50 dB, no interval)",)
    assert notes_of(records, [], [line]) == ["No intervals: they need 5 pictures or more."]


def test_edits_of_one_photograph_are_one_sample():
    records = rows_of("a", SOURCE, settings_of())
    shared = [replace(one, case=one.case | {"group": "same"}) for one in records]
    assert make_lines(records)[0].pictures == 12 and make_lines(records)[0].scores["psnr"].low
    [line] = make_lines(shared)
    assert (line.pictures, line.edits, line.scores["psnr"].low) == (1, 12, None)


def test_the_same_lines_in_any_order_of_records():
    records = three_models()
    lines = make_lines(records, baseline="better")
    for seed in range(3):
        mixed = random.Random(seed).sample(records, len(records))
        assert make_lines(mixed, baseline="better") == lines


def test_moved_pictures_are_the_same_cases():
    records = rows_of("identity", SOURCE) + [
        replace(one, case=one.case | {"source": "/elsewhere"})
        for one in rows_of("a", SOURCE, settings_of())
    ]
    line = by_label(make_lines(records))["a"]
    assert line.against["identity"]["psnr"].ties == 12 and len(line.remarks) == 1


def test_each_task_has_its_lines_after_those_of_all():
    records = []
    for number, task in itertools.product(range(6), ("snow", "night")):
        for model, settings in (("identity", None), ("a", settings_of())):
            records.append(record(f"{task}{number}", model, settings, task, psnr=20 + number))
        if task == "night":
            records.append(record(f"{task}{number}", "classical", None, task, psnr=15.0))
    lines = make_lines(records)
    assert [(line.task, line.label) for line in lines] == [
        *[("", "identity"), ("", "classical"), ("", "a")],
        *[("night", "identity"), ("night", "classical"), ("night", "a")],
        *[("snow", "identity"), ("snow", "a")],
    ]
    everything = by_label(lines)["a"]
    # A task without a classical method has none to beat; its row says that it lacks the task.
    assert by_label(lines)["classical"].remarks[0].startswith("lacks 6 of 12 cases")
    assert by_label(lines, "night")["classical"].remarks == ()
    assert everything.edits == 12 and everything.against["classical"]["psnr"].wins == 6
    assert len(everything.remarks) == 1


def test_failed_edits_are_counted_and_are_in_no_mean():
    records = rows_of("a", [20.0] * 6, settings_of())
    records[0] = replace(records[0], picture=None, scores={"psnr": 1000.0}, evaluations=0)
    [line] = make_lines(records)
    assert (line.edits, line.failed, line.means["psnr"], line.evaluations) == (6, 1, 20.0, 60)
    assert "failed" in columns_of([line])
    [line] = make_lines([replace(one, picture=None) for one in records])
    assert line.scores == {} and line.evaluations == math.inf
    assert values_of(line)["evaluations"] is None


def test_seconds_are_medians():
    records = [replace(one, seconds=1.0) for one in rows_of("a", SOURCE, settings_of())]
    records[0] = replace(records[0], seconds=1000.0)
    assert make_lines(records)[0].seconds == 1.0


def test_cases_that_a_model_lacks_are_named_and_differences_are_of_common_ones():
    records = rows_of("identity", [20.0] * 9) + rows_of("a", [21.0] * 9, settings_of())
    records += rows_of("b", [22.0] * 7, settings_of())
    line = by_label(make_lines(records, baseline="a"))["b"]
    assert line.remarks == (
        "lacks 2 of 9 cases: its means are over the others, differences over those that both have",
    )
    assert line.against["a"]["psnr"] == Difference(1.0, 1.0, 1.0, 7, 0, 0)


def test_scores_made_in_different_ways_have_no_common_mean():
    records = rows_of("a", SOURCE, settings_of())
    records[3] = replace(records[3], scored_by={"psnr": "another"}, folder=Path("two"))
    with pytest.raises(InputError, match="psnr was measured by .* in . and by 'another' in two"):
        make_lines(records)


@pytest.mark.parametrize("name", ["nobody", "a"])
def test_a_baseline_is_one_line(name):
    records = rows_of("a", SOURCE, settings_of(scale=1.0))
    records += rows_of("a", SOURCE, settings_of(scale=2.0)) + rows_of("b", SOURCE, settings_of())
    with pytest.raises(InputError, match=rf"baseline '{name}' is not one row.*a, guidance 1"):
        make_lines(records, baseline=name)
    lines = by_label(make_lines(records, baseline="a, guidance 1"))
    assert "a, guidance 1" in lines["b, guidance 7"].against


def labels(*rows):
    records = [
        record(0, model, settings, weights=weights, psnr=1.0) for model, settings, weights in rows
    ]
    return [line.label for line in make_lines(records)]


def test_labels_are_short_and_tell_lines_apart():
    plain = settings_of()
    assert labels(("a", plain, None), ("b", plain, None)) == ["a", "b"]
    assert labels(("a", plain, None), ("identity", None, None)) == ["identity", "a"]
    assert labels(("a", settings_of(scale=3.0), None), ("a", plain, None)) == [
        *("guidance 3", "guidance 7")
    ]
    apg = settings_of("apg", 3.0, 1.0)
    assert labels(("a", apg, None), ("a", plain, None)) == ["apg, 3, 1", "ip2p, 7, 1.5"]
    joint = settings_of("joint", 7.0, None, steps=10)
    assert labels(("a", plain, None), ("a", joint, None)) == [
        *("ip2p, image 1.5, 20 steps", "joint, 10 steps")
    ]
    assert labels(("a", plain, "0123456789"), ("a", plain, "abcdefghij"), ("b", plain, None)) == [
        *("a, weights 012345", "a, weights abcdef", "b")
    ]
    assert len({*labels(("a", plain, "0123456"), ("a", plain, "0123457"))}) == 2


def test_a_model_at_two_resolutions_or_precisions_has_two_lines():
    records = [
        replace(one, made_with=one.made_with | {"resolution": resolution, "dtype": dtype})
        for resolution, dtype in ((64, "float32"), (128, "float32"), (128, "bfloat16"))
        for one in rows_of("a", SOURCE, settings_of())
    ]
    assert len({one.place for one in records}) == len(records)
    lines = by_label(make_lines(records + rows_of("identity", SOURCE)))
    told = ["resolution 128, bfloat16", "resolution 128, float32", "resolution 64, float32"]
    assert [*lines] == ["identity", *(f"a, {one}" for one in told)]
    assert [line.edits for line in lines.values()] == [12] * 4
    assert {"resolution", "dtype"} <= {*columns_of([*lines.values()])}


def test_lines_of_the_same_edits_are_shared():
    first = rows_of("a", SOURCE, settings_of(scale=1.0))
    same = [replace(one, settings=settings_of("apg", 1.0)) for one in first]
    lines = by_label(make_lines(first + same + rows_of("a", SOURCE, settings_of("cads", 1.0))))
    assert {label: line.shared for label, line in lines.items()} == {
        "apg": None,
        "cads": None,
        "ip2p": "apg",
    }


def sweep_of(values, **more):
    """A line for each guidance scale."""
    return [
        record(number, "a", settings_of(scale=float(scale)), psnr=value + number, **more)
        for scale, value in enumerate(values, 1)
        for number in range(6)
    ]


def test_best_scales_are_those_of_the_records_that_select():
    reported = sweep_of([21.0, 22.0, 23.0])
    deciding = [
        replace(one, case=one.case | {"name": f"other {one.case['name']}"}, selects=True)
        for one in sweep_of([9.0, 11.0, 10.0])
    ]
    assert [line.best for line in make_lines(reported)] == [(), (), ("psnr",)]
    lines = make_lines(reported + deciding)
    assert [line.best for line in lines] == [(), ("psnr",), ()]
    assert [line.means["psnr"] for line in lines] == [23.5, 24.5, 25.5]
    assert notes_of(reported, deciding, lines) == [
        "Best scales were chosen on 6 other cases, and are reported on these."
    ]
    assert "flatters" in notes_of(reported, [], lines)[0] and "best" in columns_of(lines)
    alone = make_lines(sweep_of([20.0]))
    assert (
        not has_choice(alone) and notes_of([], [], alone) == [] and "best" not in columns_of(alone)
    )


def test_columns_are_those_that_say_something():
    records = rows_of("identity", SOURCE) + sweep_of([20.0, 21.0])
    lines = make_lines(records)
    assert columns_of(lines) == [
        *("model", "guidance_scale", "edits", "evaluations", "seconds", "best", "psnr")
    ]
    assert common_settings(lines) == {
        "guidance": "ip2p",
        "image_guidance_scale": 1.5,
        "effective_image_guidance_scale": 1.5,
        "sampler": "euler",
        "spacing": "linspace",
        "num_steps": 20,
    }
    nested = settings_of("nested", 3.0) | {"effective_guidance_scale": 4.5}
    several = make_lines(records + rows_of("a", SOURCE, nested))
    assert {"guidance", "effective_guidance_scale"} <= {*columns_of(several)}


def shown(lines):
    """The tables in Markdown, by title."""
    return {table.title: markdown(table) for table in tables_of(lines)}


def test_tables_list_free_rows_first_and_then_those_of_equal_cost():
    records = three_models() + rows_of("twice", SOURCE, settings_of(), evaluations=120)
    text = shown(make_lines(records))["All pictures"]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    models = ["identity", "oracle", "classical", "better", "unclear", "worse", "twice"]
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {model}" for model in models]
    assert "| oracle | 12 | 0 | 0.000 | inf |" in text and "PSNR, dB: against the target" in text
    assert re.search(
        r"\| better \| 12 \| 60 \| 1.500 \| \d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\] \|", text
    )
    assert {row.count("|") for row in rows} == {6}


def test_differences_have_a_table_for_each_reference_and_task():
    tables = [*tables_of(make_lines(three_models(), baseline="better"))]
    names = [
        f"All pictures: differences from {name}" for name in ("identity", "better", "classical")
    ]
    assert sorted(table.title for table in tables) == sorted(["All pictures", *names])
    text = shown(make_lines(three_models()))[names[0]]
    assert re.search(r"\| worse \| -\d\.\d\d \[-\d\.\d\d, -\d\.\d\d\] 0 / 0 / 12 \|", text)
    assert "nan" not in text
    [first] = [table for table in tables if table.title == names[0]]
    verdicts = {row[0].text: row[1].verdict for row in first.rows}
    assert verdicts["better"] == "better" and verdicts["worse"] == "worse"
    assert verdicts["unclear"] == ""
    several = [replace(one, case=one.case | {"task": "snow"}) for one in three_models()]
    tasks = shown(make_lines(three_models() + several))
    assert "snow" in tasks and "snow: differences from classical" in tasks


def test_a_metric_that_is_not_defined_in_a_task_is_a_dash_and_in_no_mean():
    records = [
        replace(one, case=one.case | {"task": task}, scores=one.scores | scores)
        for task, scores in (("add", {"outside_psnr": 30.0}), ("rain", {}))
        for one in three_models()
    ]
    lines = make_lines(records)
    tables = {table.title: table for table in tables_of(lines)}
    for title, text in (("All pictures", "30.00"), ("add", "30.00"), ("rain", "-")):
        column = [*tables[title].heads].index("PSNR outside, dB")
        assert {row[column].text for row in tables[title].rows} == {text}, title
    rows = [*csv.DictReader(io.StringIO(csv_of_lines(lines)))]
    assert {(row["task"], row["outside_psnr"]) for row in rows if row["task"] != "all"} == {
        *(("add", "30.0"), ("rain", ""))
    }


def test_csv_has_all_digits_and_the_ends_of_intervals():
    lines = make_lines(three_models())
    rows = {row["label"]: row for row in csv.DictReader(io.StringIO(csv_of_lines(lines)))}
    line, row = by_label(lines)["worse"], rows["worse"]
    score, difference = line.scores["psnr"], line.against["identity"]["psnr"]
    assert [float(row[f"psnr{end}"]) for end in ("", "_low", "_high")] == [
        *(score.mean, score.low, score.high)
    ]
    assert float(row["psnr_minus_identity_high"]) == difference.high
    assert row["psnr_minus_identity_losses"] == "12" and row["psnr_minus_classical"] != ""
    assert row["remarks"].count(";") == 1 and row["guidance"] == "ip2p"
    assert rows["oracle"]["psnr"] == "inf" and rows["oracle"]["psnr_low"] == ""
    assert csv_of_lines(lines).startswith("task,label,model,")


def test_csv_of_edits_has_a_row_for_each_record():
    records = three_models()
    rows = [*csv.DictReader(io.StringIO(csv_of_edits(records)))]
    assert len(rows) == len(records)
    by_key = {record.key: record for record in records}
    for row in rows:
        one = by_key.pop(row["key"])
        assert (row["name"], row["model"], float(row["psnr"])) == (
            *(one.case["name"], one.model, one.scores["psnr"]),
        )
    assert rows == sorted(rows, key=lambda row: row["name"])
    edited = [row for row in rows if row["guidance"]]
    assert edited[0]["guidance_scale"] == "7.0" and edited[0]["device_name"] == "Some CPU"


def test_latex_is_escaped_and_complete():
    records = [
        replace(one, model="50% & more_$#{}~^\\<|>") if one.model == "worse" else one
        for one in three_models()
    ]
    text = latex(make_lines(records))
    assert text.count(r"\begin{tabular}{lrr}") == text.count(r"\end{tabular}") == 1
    assert r"\toprule" in text and text.count(r"\midrule") == 2 and r"\bottomrule" in text
    assert (
        r"50\% \& more\_\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}"
        r"\textless{}\textbar{}\textgreater{} & 60 & "
    ) in text
    assert r"oracle & 0 & $\infty$ \\" in text
    assert re.search(
        r"better & 60 & \d+\.\d\d \{\\scriptsize \[\d+\.\d\d, \d+\.\d\d\]\} \\\\", text
    )
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {2}


def test_no_row_of_latex_is_read_as_the_end_of_the_one_above():
    text = latex(make_lines(rows_of("[5cm]", SOURCE, settings_of()) + rows_of("*b", SOURCE)))
    assert "{[}5cm] & 60" in text and "{*}b & 0" in text


def test_there_are_no_lines_of_nothing():
    lines = make_lines([])
    assert lines == [*tables_of(lines)] == [*tables_of_match(lines)] == []


def test_what_people_type_is_escaped_in_markdown():
    records = rows_of("a|<b>", SOURCE, settings_of(), task="z|<i>")
    records += rows_of("c", SOURCE, settings_of(), task="=1+1")
    text = "".join(shown(make_lines(records)).values())
    assert "<b>" not in text and "<i>" not in text and r"a\|&lt;b>" in text
    assert escaped("a\nb") == "a b"
    assert "'=1+1" in csv_of_lines(make_lines(records))


def test_seconds_say_what_they_were_measured_on():
    records = rows_of("identity", SOURCE) + rows_of("a", SOURCE, settings_of())
    on = about_of(records, [])["computed on"]
    assert on == "cpu (Some CPU, 2 threads), float32, in batches of 4"
    records[-1] = replace(records[-1], computed_on=CPU | {"batch_size": 7, "compiled": True})
    on = about_of(records, [])["computed on"]
    assert "compiled, in batches of 7 (seconds of different ones do not" in on


def change_line(guidance, scale, image, change, steps=20):
    scores = {"change": Estimate(change)}
    settings = settings_of(guidance, scale, image, steps=steps)
    return Line(
        "a", settings, ALL, 9, 9, evaluations=60.0, scores=scores, label=f"{guidance} {scale}"
    )


def test_schemes_are_matched_at_a_change_that_all_can_reach():
    lines = [change_line("ip2p", s, 1.5, c) for s, c in ((1.0, 2.0), (3.0, 6.0), (7.0, 12.0))]
    lines += [change_line("apg", s, 1.5, c) for s, c in ((3.0, 5.0), (7.0, 7.0), (9.0, 8.0))]
    lines = [Line("identity", None, ALL, 9, 9), *lines]
    change, at_change, at_scales = match_change(lines)
    assert change == 6.5  # the median of 6, 5, 7 and 8: 2 and 12 are out of reach of apg
    assert [one.label for one in at_change] == ["ip2p 3.0", "apg 7.0"]
    assert [one.label for one in at_scales] == ["ip2p 3.0", "apg 3.0"]
    titles = [table.title for table in tables_of_match(lines)]
    assert titles == ["Schemes at equal change, 6.50 %", "Schemes at equal scales"]
    assert match_change(lines[:4])[1] == []  # one scheme
    far = [change_line("cads", s, 1.5, 20.0 + s) for s in (1.0, 2.0)]
    assert match_change([*lines, *far])[1] == []  # no common change


def test_a_scheme_without_a_scale_is_at_each_of_its_values():
    lines = [change_line("ip2p", 3.0, image, 5.0 + image) for image in (1.0, 2.0)]
    lines += [change_line("joint", s, None, 4.0 + s) for s in (2.0, 3.0)]
    _, _, at_scales = match_change(lines)
    assert [one.label for one in at_scales] == ["ip2p 3.0", "joint 3.0"]


def test_the_front_is_what_nothing_beats_in_all_coordinates():
    points = [(20, 60), (25, 60), (25, 120), (30, 240), (25, 60), (math.nan, 1)]
    assert pareto(points, (1, -1)) == [False, True, False, True, True, False]
    assert pareto([(1, 1), (2, 2)], (1, 1)) == [False, True]


def test_cells_of_rows_without_settings_are_empty():
    cells = values_of(make_lines(rows_of("identity", SOURCE))[0])
    assert cells["guidance"] is None and cells["psnr"].low is not None and cells["task"] == "all"


def test_no_minus_stands_before_zeros():
    assert cell("psnr", Estimate(-0.001, -0.004, 0.001)).text == "0.00"
    assert cell("psnr", Difference(-0.001, -0.2, 0.001)).text == "+0.00"
    assert cell("psnr", Difference(-0.001, -0.2, 0.001)).beside.startswith("[-0.20, +0.00]")
