"""Benchmarks that a language model judges: layouts, requests, answers, and what they add up to."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.judged import (
    export_requests,
    mean_over_tasks,
    read_answers,
)
from ipx2p.eval.benchmarks.registry import PROTOCOLS, read_benchmark
from ipx2p.eval.records import Record
from tests.eval.benchmarks.test_edit_sets import encoded, parquet, write


def imgedit(root):
    entries = {
        "1082": ("animal/000342021.jpg", "Change the shell.", "alter"),
        "673": ("style/000278574.jpg", "Make it a woodblock print.", "style"),
        "1149": ("compose/human/14.jpg", "Remove the box and brighten it.", "compose"),
    }
    for number, (file, _, _) in enumerate(entries.values()):
        write(root / "original_images" / file, encoded(number, format="JPEG"))
    names = ("id", "prompt", "edit_type")
    listed = {key: dict(zip(names, entry, strict=True)) for key, entry in entries.items()}
    write(root / "basic_edit.json", listed)


def gedit(root):
    rows = [
        {
            "task_type": task,
            "key": f"{number}{language}",
            "instruction": f"{language} {number}",
            "instruction_language": language,
            "input_image": {"bytes": encoded(number), "path": None},
            "input_image_raw": {"bytes": encoded(50 + number), "path": None},
            "Intersection_exist": True,
        }
        for number, task in enumerate(("subject-add", "subject-add", "text_change"))
        for language in ("en", "cn")
    ]
    parquet(root / "data/train-00000-of-00001.parquet", rows)


def records_of(cases, folder, models=("identity", "a")):
    """Records as a finished run of these cases has them."""
    found = []
    for model in models:
        for case in cases:
            file = f"{model}-{case.name}.png"
            write(folder / file, encoded(len(found)))
            about = {
                "name": case.name,
                "group": case.group or case.name,
                "task": case.task,
                "instruction": case.instruction,
                "benchmark": case.benchmark,
            }
            settings = None if model == "identity" else {"guidance_scale": 7.5}
            picture = {"file": file}
            found.append(Record(file, file, about, model, settings, 0, {}, picture, folder=folder))
    return found


@pytest.fixture
def asked(tmp_path):
    """Builds a set, "edits" it, and asks; returns records and the file of requests."""

    def ask(name):
        {"imgedit": imgedit, "gedit": gedit}[name](tmp_path / "set")
        cases = read_benchmark(name, tmp_path / "set", tmp_path / "extracted")
        records = records_of(cases, tmp_path / "run/edits")
        path = tmp_path / "run/requests.jsonl"
        export_requests(records, path, PROTOCOLS[name].judge)
        return records, path

    return ask


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(path, give):
    """Answers to the requests of a file: `give(request)` is the text."""
    answers = path.with_name("answers.jsonl")
    given = [{"id": one["id"], "answer": give(one)} for one in lines(path)]
    answers.write_text("".join(json.dumps(one) + "\n" for one in given))
    return answers


def test_imgedit_is_read_with_its_types_and_result_names(asked):
    records, _ = asked("imgedit")
    assert Counter(record.case["task"] for record in records) == {
        "alter": 2,
        "style": 2,
        "compose": 2,
    }


def test_gedit_is_read_in_english_with_its_official_result_names(tmp_path):
    gedit(tmp_path / "set")
    cases = read_benchmark("gedit", tmp_path / "set", tmp_path / "x")
    assert [case.name for case in cases] == ["0en", "1en", "2en"]
    assert cases[0].results[0] == "fullset/subject-add/en/0en.png"
    assert cases[0].source.read_bytes() == encoded(0)  # and not the raw one


def test_requests_name_the_judge_and_show_source_and_edit_by_relative_path(asked):
    records, path = asked("gedit")
    requests = lines(path)
    assert len(requests) == 2 * len(records)
    sc, pq = requests[-2:]
    assert sc["judge"] == "gpt-4.1"
    assert sc["pictures"] == ["edits/identity-2en.png", "edits/a-2en.png"]
    assert pq["pictures"] == ["edits/a-2en.png"]
    assert "en 2" in sc["prompt"]
    assert "<edit_prompt>" not in sc["prompt"]
    assert all((path.parent / picture).is_file() for one in requests for picture in one["pictures"])


def test_imgedit_scores_are_means_of_three_in_either_form(asked):
    records, path = asked("imgedit")
    official = "Brief reasoning: fine.\nPrompt Compliance: 1\nSeamlessness: 4\nFidelity: 4"
    json_form = '```json\n{"score": [5, 4, 4.5], "reasoning": "ratio 1:3"}\n```'
    answers = answer(path, lambda one: official if "identity" in one["id"] else json_form)
    scored = read_answers(answers, records, "gpt-4o")
    assert {record.scores["judged"] for record in scored if record.model == "identity"} == {3.0}
    assert {record.scores["judged"] for record in scored if record.model == "a"} == {4.5}
    assert {record.scored_by["judged"] for record in scored} == {"gpt-4o"}


def test_gedit_takes_the_smaller_of_two_and_means_groups_before_groups(asked):
    """O = sqrt(SC PQ) of each sample, mean in each group, mean of the groups."""
    records, path = asked("gedit")
    scores = {"0en": ((9, 4), (8, 9)), "1en": ((6, 6), (6, 7)), "2en": ((0, 10), (9, 9))}

    def give(one):
        key, name = one["id"].split("/")
        given = scores[key.rpartition("-")[2].removesuffix(".png")][name == "pq"]
        return json.dumps({"score": given, "reasoning": ""})

    scored = read_answers(answer(path, give), records, "gpt-4.1")
    mine = [record for record in scored if record.model == "a"]
    assert mine[0].scores == {
        "judged_sc": 4,
        "judged_pq": 8,
        "judged": pytest.approx(math.sqrt(32)),
    }
    overall = mean_over_tasks(mine, ["judged"])["judged"].mean
    assert overall == pytest.approx(((math.sqrt(32) + 6) / 2 + 0) / 2)


def test_the_interval_over_tasks_holds_the_true_mean_at_its_rate():
    """Two tasks of unequal size and far apart, whose true means are 2 and 8: 5 overall."""
    hits, widths = 0, []
    for trial in range(200):
        draws = np.random.default_rng(trial)
        values = [*draws.normal(2, 1, 12), *draws.normal(8, 1, 36)]
        mine = [
            Record("", "", {"group": str(i), "task": "st"[i < 12]}, "a", None, 0, {}, None)
            for i in range(48)
        ]
        for record, value in zip(mine, values, strict=True):
            record.scores["judged"] = value
        score = mean_over_tasks(mine, ["judged"])["judged"]
        assert score.mean == pytest.approx((np.mean(values[:12]) + np.mean(values[12:])) / 2)
        hits += score.low <= 5 <= score.high
        widths.append(score.high - score.low)
    exact = 2 * 1.96 * math.sqrt(1 / 12 + 1 / 36) / 2
    assert 0.9 <= hits / 200 <= 0.98
    assert np.mean(widths) == pytest.approx(exact, rel=0.15)


def test_a_refused_answer_is_left_out_and_the_judge_may_be_another(asked):
    records, path = asked("imgedit")
    answers = answer(path, lambda one: '{"score": [3, 3, 3]}')
    given = lines(answers)
    given[0]["answer"] = None
    for one in given:
        one["judge"] = "qwen"
    answers.write_text("".join(json.dumps(one) + "\n" for one in given))
    scored = read_answers(answers, records, "gpt-4o")
    assert len(scored) == len(records) - 1
    assert scored[0].scored_by == {"judged": "qwen"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda given: given.pop(), "lacks 1 of 6 answers, the first of them a-1149.png/edit"),
        (lambda given: given.append(given[0]), "line 7 answers identity-1082.png/edit a second"),
        (lambda given: given[1].update(id="else"), "lacks 1 of 6"),
        (lambda given: given.append({"id": "x/edit", "answer": ""}), "answers x/edit, which no"),
        (lambda given: given[2].pop("answer"), "line 3 is not"),
        (lambda given: given[0].update(answer="great"), r"scores \[\], expected 3 from 1 to 5"),
        (lambda given: given[0].update(answer='{"score": [3, 3, 6]}'), "expected 3 from 1 to 5"),
    ],
)
def test_answers_that_do_not_fit_are_one_clear_line(asked, spoil, message):
    records, path = asked("imgedit")
    answers = answer(path, lambda one: '{"score": [3, 3, 3]}')
    given = lines(answers)
    spoil(given)
    answers.write_text("".join(json.dumps(one) + "\n" for one in given))
    with pytest.raises(InputError, match=message) as error:
        read_answers(answers, records, "gpt-4o")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("imgedit", lambda r: (r / "basic_edit.json").unlink(), "basic_edit.json does not exist"),
        (
            "imgedit",
            lambda r: (r / "original_images/style/000278574.jpg").unlink(),
            r"style/000278574.jpg is missing .*'673' lists it",
        ),
        (
            "imgedit",
            lambda r: write(r / "basic_edit.json", {"1": {"id": "x.jpg", "edit_type": "add"}}),
            "'prompt' is None, expected a sentence",
        ),
        ("gedit", lambda r: (r / "data/train-00000-of-00001.parquet").unlink(), "not the root of"),
    ],
)
def test_a_missing_part_is_one_clear_line(tmp_path, name, damage, message):
    root = tmp_path / "set"
    {"imgedit": imgedit, "gedit": gedit}[name](root)
    damage(root)
    with pytest.raises(InputError, match=message) as error:
        read_benchmark(name, root, tmp_path / "x")
    assert "\n" not in str(error.value)
