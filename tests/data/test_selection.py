"""Fractions, tasks that are left out, and what is said of pairs."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from ipx2p.data.instructions import bank
from ipx2p.data.pairs import ManifestPairs, Pairs, centre_geometry
from ipx2p.data.selection import Subset, Worded, leave_out, open_banks, take_fraction
from ipx2p.errors import InputError

SENTENCES = ["one", "two", "three", "four"]


def open_manifest(path, numbers=range(200), sentences=SENTENCES):
    """A tenth of the pairs are of task b, the rest of a."""
    records = [
        {
            "source": f"in/{number}.png",
            "target": f"out/{number}.png",
            "instruction": sentences,
            "task": "b" if number % 10 == 0 else "a",
        }
        for number in numbers
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return ManifestPairs(path)


@pytest.fixture
def pairs(tmp_path):
    return open_manifest(tmp_path / "pairs.jsonl")


def names(pairs):
    return {pairs.files(item)[0].name for item in range(len(pairs))}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Which pairs


def test_smaller_fractions_lie_inside_larger_ones(pairs):
    taken = [names(take_fraction(pairs, fraction)) for fraction in (0.01, 0.1, 0.3, 0.31, 1)]
    assert [len(found) for found in taken] == [3, 20, 60, 62, 200]  # 1.8 + 0.2, at least one of b
    assert all(small < large for small, large in pairwise(taken))


def test_every_task_gets_its_share(pairs):
    counts = {task: len(items) for task, items in take_fraction(pairs, 0.3).by_task().items()}
    assert counts == {"a": 54, "b": 6}


def test_a_fraction_does_not_hang_on_the_order_of_the_lines_or_the_sentences(pairs, tmp_path):
    turned = open_manifest(tmp_path / "turned.jsonl", range(199, -1, -1), "other")
    assert names(take_fraction(pairs, 0.3)) == names(take_fraction(turned, 0.3))
    assert names(take_fraction(pairs, 0.3)) != {f"{number}.png" for number in range(60)}


def test_a_subset_says_of_its_pairs_what_the_whole_says(pairs):
    items = np.array([190, 7, 20])
    subset = Subset(pairs, items)
    assert len(subset) == 3 and [subset.number(item) for item in range(3)] == [7, 20, 190]
    for item, number in enumerate((7, 20, 190)):
        assert subset.describe(item) == pairs.describe(number)
        assert subset.files(item) == pairs.files(number)
        assert subset.task(item) == pairs.task(number)
        assert subset.instructions(item) == pairs.instructions(number)
    for name in ("digests", "sentence_digests"):
        assert np.array_equal(getattr(subset, name)(), getattr(pairs, name)()[[7, 20, 190]])
    found, asked = subset.by_task(), Pairs.by_task(subset)
    assert {task: items.tolist() for task, items in found.items()} == {"a": [0], "b": [1, 2]}
    assert {task: items.tolist() for task, items in asked.items()} == {"a": [0], "b": [1, 2]}
    assert [*Subset(pairs, np.array([7])).by_task()] == ["a"]


def test_a_subset_shows_the_pictures_of_its_pairs(pairs, tmp_path):
    for folder, colour in (("in", "red"), ("out", "teal")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / folder / "5.png")
    subset = Subset(pairs, np.array([3, 5]))
    pair = subset.get(1, lambda size: centre_geometry(size, 4), seeded())
    assert pair.source_pixels01[0].min() == 1 and pair.target_pixels01[0].max() == 0


def test_tasks_can_be_left_out(pairs):
    assert len(leave_out(pairs, ["b"])) == 180 and [*leave_out(pairs, ["b"]).by_task()] == ["a"]
    assert leave_out(pairs, []) is pairs
    with pytest.raises(
        InputError, match=r"holdout_tasks: no pair has task 'B'; .*known here: a, b"
    ):
        leave_out(pairs, ["B"])
    with pytest.raises(InputError, match="names all tasks, a, b: none is left"):
        leave_out(pairs, ["a", "b"])


# What is said


def test_one_sentence_a_pair_is_the_same_at_every_visit_and_another_for_other_pairs(pairs):
    worded = Worded(pairs, "per_pair", {})
    said = [worded.instructions(item) for item in range(200)]
    assert {len(sentences) for sentences in said} == {1}
    assert said == [Worded(pairs, "per_pair", {}).instructions(item) for item in range(200)]
    counts = Counter(sentence for (sentence,) in said)
    assert sorted(counts) == sorted(SENTENCES) and min(counts.values()) > 30


def test_one_sentence_a_pair_does_not_hang_on_the_order_of_the_lines(pairs, tmp_path):
    turned = open_manifest(tmp_path / "turned.jsonl", range(199, -1, -1))
    one, other = Worded(pairs, "per_pair", {}), Worded(turned, "per_pair", {})
    assert all(one.instructions(i) == other.instructions(199 - i) for i in range(200))


def test_a_bank_replaces_the_sentences_of_its_task_only(pairs):
    worded = Worded(pairs, "per_step", {"b": ("x", "y")})
    assert worded.instructions(10) == ("x", "y") and worded.instructions(11) == (*SENTENCES,)
    assert {worded.instruction(10, seeded(seed)) for seed in range(20)} == {"x", "y"}
    drawn = {
        Worded(pairs, "per_pair", {"b": ("x", "y")}).instructions(i) for i in range(0, 200, 10)
    }
    assert drawn == {("x",), ("y",)}


def test_a_fixed_sentence_is_the_first_of_the_bank(tmp_path, pairs):
    (tmp_path / "bank.txt").write_text("first\nsecond\n")
    banks = open_banks({"a": str(tmp_path / "bank.txt"), "b": "denoise"}, ["a", "b"])
    worded = Worded(pairs, "fixed", banks)
    assert worded.instructions(1) == ("first",)
    assert worded.instructions(0) == (bank("denoise")[0],)
    with pytest.raises(InputError, match=r"task 'b' has no bank of sentences: set data\.banks\.b"):
        Worded(pairs, "fixed", {"a": ("x",)})


def test_other_sentences_are_other_digests_of_their_task(pairs):
    plain = pairs.sentence_digests()
    one, other = (Worded(pairs, "per_step", {"b": (text,)}).sentence_digests() for text in "xy")
    is_b = np.arange(200) % 10 == 0
    assert (one != plain).tolist() == (one != other).tolist() == is_b.tolist()
    assert np.array_equal(Worded(pairs, "per_step", {"b": ("x",)}).digests(), pairs.digests())


def test_banks_of_tasks_that_are_not_there_are_refused():
    with pytest.raises(
        InputError, match=r"data\.banks: no pair has task 'dreain'; did you mean de"
    ):
        open_banks({"dreain": "x.txt"}, ["derain", "denoise"])
