"""What a run trains on: shares of tasks, sentences, and pairs that cannot be used."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image

from ipx2p.data.loader import StepSampler
from ipx2p.data.workers import micro_batches
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.files import read_json, write_json
from ipx2p.training.learners import EditLearner
from ipx2p.training.loop import train
from ipx2p.training.samples import (
    check_unchanged,
    note_pairs,
    open_pairs,
    open_stream,
    task_table,
    task_weights,
)
from ipx2p.training.validation import fixed_pairs
from tests.training.conftest import all_tensors, assert_same_run, forget

COUNTS = {"derain": 12, "denoise": 4}


@pytest.fixture
def make(make_config, tmp_path):
    """Settings for 16 pairs of two tasks; every picture is of one colour, that of its number."""
    rows = []
    for number, task in enumerate(task for task, n in COUNTS.items() for _ in range(n)):
        Image.new("RGB", (32, 32), (number * 15, 0, 0)).save(tmp_path / f"{number}.png")
        name = f"{number}.png"
        rows.append({"source": name, "target": name, "task": task, "instruction": ["x", "y", "z"]})
    for name, part in (("train", rows), ("val", rows[::5])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))

    def make(*overrides):
        return make_config(
            "data.photos=null", "data.held_out=[]", "data.instructions=per_step",
            f"data.manifest={tmp_path / 'train.jsonl'}",
            f"data.validation_manifest={tmp_path / 'val.jsonl'}",
            f"data.cache_dir={tmp_path / 'cache'}", "validation.pairs_per_task=1",
            "validation.every=9", *overrides,
        )  # fmt: skip

    return make


def take(config, count, workers=0, learner=None):
    """A batch of the first samples."""
    pairs, _ = open_pairs(config.data)
    stream = open_stream(config, pairs, learner, World(), lambda: None)
    [batch] = micro_batches(stream, StepSampler(range(1), count), workers=workers)
    return batch


def numbers(batch):
    """Which pictures the samples show."""
    return ((batch.target_pixels[:, 0, 0, 0] + 1) * 127.5 / 15).round().int().tolist()


# Tasks


def test_without_a_mixture_tasks_come_as_often_as_they_have_pairs(make):
    assert Counter(take(make(), 32).tasks) == {"derain": 24, "denoise": 8}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.mixture={derain: 1, denoise: 3}", {"derain": 10, "denoise": 30}),
        ("data.mixture={derain: 0, denoise: 3}", {"denoise": 40}),
        ("data.temperature=.inf", {"derain": 20, "denoise": 20}),
        ("data.temperature=1", {"derain": 30, "denoise": 10}),
    ],
)
def test_tasks_come_as_often_as_the_settings_say(make, override, expected):
    found = Counter(take(make(override), 40).tasks)
    assert found.keys() == expected.keys()
    assert all(abs(found[task] - count) <= 1 for task, count in expected.items())


def test_a_mixture_shows_the_same_samples_to_runs_with_a_cache(make):
    config = make("data.mixture={derain: 1, denoise: 1}", "data.draws=2")
    plain = take(config, 40)
    config.data.cache = True
    _, held_out = open_pairs(config.data)
    fixed = fixed_pairs(held_out, per_task=1, resolution=32, seed=0)
    learner = EditLearner(config, torch.device("cpu"), fixed, World())
    encoded = take(config, 40, learner=learner)
    assert (encoded.tasks, encoded.indices) == (plain.tasks, plain.indices)


def test_the_table_tells_pairs_and_shares(make):
    config = make("data.temperature=.inf", "data.fraction=0.5")
    pairs, _ = open_pairs(config.data)
    rows = [row.split() for row in task_table(pairs, task_weights(config.data, pairs)).split("\n")]
    assert rows[1:] == [["denoise", "2", "50.0%"], ["derain", "6", "50.0%"]]


def test_only_training_leaves_tasks_and_pairs_out(make):
    trained, held_out = open_pairs(make("data.holdout_tasks=[denoise]", "data.fraction=0.25").data)
    assert [*trained.by_task()] == ["derain"] and len(trained) == 3
    assert [*held_out.by_task()] == ["denoise", "derain"] and len(held_out) == 4


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.mixture={derain: 1, denoise: 1}", "data.temperature=2"),
        ("data.on_error=skip", "data.cache=true", "data.draws=1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make, overrides):
    with pytest.raises(InputError, match="choose one|data.cache needs every pair"):
        make(*overrides)


@pytest.mark.slow
def test_a_run_with_a_mixture_and_a_fraction_resumes_exactly(make, tmp_path, capsys):
    overrides = ("data.mixture={derain: 1, denoise: 3}", "data.fraction=0.5")
    for name in ("whole", "cut"):
        train(make(*overrides, f"run.name={name}"))
    assert "denoise                     2       75.0%" in capsys.readouterr().out
    forget(tmp_path / "runs" / "cut", 2)
    train(make(*overrides, "run.name=cut"))
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "cut")


# Sentences


def test_sentences_are_drawn_as_the_policy_says(make, tmp_path):
    (tmp_path / "bank.txt").write_text("first\nsecond\n")
    banks = f"data.banks={{derain: {tmp_path / 'bank.txt'}}}"

    def said(*overrides):
        found = {}
        batch = take(make(banks, *overrides), 96)
        for number, sentence in zip(numbers(batch), batch.instructions, strict=True):
            found.setdefault(number, set()).add(sentence)
        return found

    per_step = said()
    assert set().union(*(per_step[n] for n in range(12))) == {"first", "second"}
    assert set().union(*(per_step[n] for n in range(12, 16))) == {"x", "y", "z"}
    assert max(map(len, per_step.values())) > 1
    per_pair = said("data.instructions=per_pair")
    assert {len(found) for found in per_pair.values()} == {1}
    assert per_pair == said("data.instructions=per_pair", "run.seed=1")
    assert set().union(*(per_pair[n] for n in range(12))) == {"first", "second"}
    fixed = said("data.instructions=fixed")
    assert all(fixed[number] == {"first"} for number in range(12))


def test_a_bank_that_changed_is_refused_on_resume(make, tmp_path):
    (tmp_path / "bank.txt").write_text("first\n")
    config = make(f"data.banks={{derain: {tmp_path / 'bank.txt'}}}")
    note_pairs(open_pairs(config.data)[0], tmp_path)
    check_unchanged(open_pairs(config.data)[0], tmp_path, World())
    (tmp_path / "bank.txt").write_text("second\n")
    with pytest.raises(
        InputError, match='the pairs are not those .*12 have other pictures, .*"second"'
    ):
        check_unchanged(open_pairs(config.data)[0], tmp_path, World())


@pytest.mark.parametrize("content", [{"pairs": ["12", "34"]}, {"digests": "%"}, {"digests": 3}])
def test_damaged_notes_of_the_pairs_are_one_line(make, tmp_path, content):
    write_json(content, tmp_path / "pairs.json")
    with pytest.raises(InputError, match=r"pairs\.json is damaged"):
        check_unchanged(open_pairs(make().data)[0], tmp_path, World())


def test_notes_of_the_pairs_are_small(make, tmp_path):
    note_pairs(open_pairs(make().data)[0], tmp_path)
    assert read_json(tmp_path / "pairs.json")["count"] == 16
    assert (tmp_path / "pairs.json").stat().st_size < 16 * 11 + 60


# Pairs that cannot be used


@pytest.fixture
def broken(tmp_path):
    """Two pictures of task derain are broken; called before `make`'s settings are used."""

    def break_them():
        (tmp_path / "3.png").write_bytes(b"no picture")
        (tmp_path / "7.png").unlink()

    return break_them


@pytest.mark.parametrize("draws", ["null", "2"])
def test_another_pair_of_the_task_stands_for_a_broken_one(make, broken, draws):
    whole = take(make(f"data.draws={draws}"), 48)
    config = make("data.on_error=skip", f"data.draws={draws}")
    broken()
    batch = take(config, 48)
    before, after = numbers(whole), numbers(batch)
    changed = [place for place in range(48) if before[place] != after[place]]
    assert sorted(before[place] for place in changed) == [3, 3, 3, 7, 7, 7]
    assert all(after[place] in {*range(12)} - {3, 7} for place in changed)
    assert batch.tasks == whole.tasks and len(batch.skipped) >= 6
    assert {error.split(":")[0].rpartition(" ")[2] for error in batch.skipped} == {"4", "8"}
    again = take(config, 48, workers=1)  # as a process that resumes
    assert numbers(again) == after and again.skipped == batch.skipped


def test_a_broken_pair_stops_a_run_that_is_not_told_otherwise(make, broken):
    config = make()
    broken()
    with pytest.raises(InputError, match=r"train\.jsonl line [48]: .*[37]\.png"):
        take(config, 48)


def test_a_task_without_a_pair_that_can_be_used_is_an_error(make, tmp_path):
    config = make("data.on_error=skip")
    for number in range(12, 16):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"9 pairs of task 'denoise' drawn in a row .*line 1[3-6]"):
        take(config, 48)


def test_broken_pairs_are_named_once_and_counted(make, broken, tmp_path, capsys):
    config = make("data.on_error=skip", "train.steps=8", "data.workers=1")
    broken()
    train(config)
    out = capsys.readouterr().out
    assert out.count("warning: skipped ") == 2
    assert out.count("train.jsonl line 4") == 1 and out.count("train.jsonl line 8") == 1
    lines = (tmp_path / "runs" / "test" / "metrics.jsonl").read_text().splitlines()
    counts = [json.loads(line)["data/skipped"] for line in lines if "loss" in json.loads(line)]
    assert counts == sorted(counts) and counts[-1] == 2 and counts[0] < 2


@pytest.mark.slow
def test_a_run_that_stopped_at_a_broken_pair_can_go_on_without_it(make, broken, tmp_path):
    train(make("train.steps=2", "optimizer.schedule=constant"))
    broken()
    train(make("train.steps=4", "optimizer.schedule=constant", "data.on_error=skip"))
    assert all(tensor.isfinite().all() for tensor in all_tensors(tmp_path / "runs/test").values())
