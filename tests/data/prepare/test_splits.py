"""Splits: by source picture, the same for all data sets, copies together."""

from collections import defaultdict
from hashlib import blake2b

import pytest

from ipx2p.data.manifest import Record
from ipx2p.data.prepare.dataset import _split
from ipx2p.data.prepare.splits import assign_splits, hash_share
from ipx2p.errors import InputError

SHARES = (90, 5, 5)
NAMES = [f"photo {number}" for number in range(400)]


def assign(names, fingerprints=None, shares=SHARES, seed=0):
    groups = names if isinstance(names, dict) else dict.fromkeys(names)
    return assign_splits(groups, fingerprints or {}, shares=shares, seed=seed)


def test_shares_are_kept():
    found = [*assign(NAMES).values()]
    assert 10 <= found.count("val") <= 30 and 10 <= found.count("test") <= 30


def test_a_picture_keeps_its_split_in_a_larger_set():
    whole = assign(NAMES)
    assert assign(NAMES[::-2]) == {name: whole[name] for name in NAMES[::-2]}


def test_another_seed_splits_in_another_way():
    assert assign(NAMES) != assign(NAMES, seed=1)


@pytest.mark.parametrize("count", [3, 4, 16])
@pytest.mark.parametrize("seed", range(5))
def test_each_split_of_few_pictures_gets_one(count, seed):
    assert {*assign(NAMES[:count], seed=seed).values()} == {"train", "val", "test"}


@pytest.mark.parametrize("seed", range(5))
def test_few_pictures_leave_one_to_train_on(seed):
    assert {*assign(NAMES[:3], shares=(1, 1, 1), seed=seed).values()} == {"train", "val", "test"}


def test_one_picture_is_trained_on_or_held_out_but_there():
    assert len(assign(NAMES[:1])) == 1


def test_copies_go_together():
    prints = {
        name: blake2b(bytes([number // 2]), digest_size=64).hexdigest()
        for number, name in enumerate(NAMES)
    }
    splits = assign(NAMES, prints)
    assert all(splits[a] == splits[b] for a, b in zip(NAMES[::2], NAMES[1::2], strict=True))
    assert {*splits.values()} == {"train", "val", "test"}


def test_published_splits_are_kept():
    published = {"a": "train", "b": "val", "c": "test", "d": "train"}
    assert assign(published) == published


def test_validation_is_taken_from_training_where_none_is_published():
    published = {name: "test" if place % 4 == 0 else "train" for place, name in enumerate(NAMES)}
    splits = assign(published)
    assert all(splits[name] == "test" for name in NAMES[::4])
    found = [splits[name] for name in NAMES if published[name] == "train"]
    assert 3 <= found.count("val") <= 30 and "test" not in found


@pytest.mark.parametrize(
    "shares", [(0, 50, 50), (90, 5), (90, -1, 5), (float("nan"), 1, 1), (1e308,) * 3]
)
def test_shares_that_cannot_be_are_refused(shares):
    with pytest.raises(InputError, match="shares of train, val and test"):
        assign(NAMES, shares=shares)


def test_hash_shares_look_uniform():
    values = sorted(hash_share(0, name) for name in NAMES)
    assert all(abs(value - place / 400) < 0.1 for place, value in enumerate(values))


def test_groups_that_share_a_picture_stay_together():
    groups = {f"rainy {i}": None for i in range(60)}
    together = [(f"rainy {i % 6}", name) for i, name in enumerate(groups)]
    splits = assign_splits(groups, {}, together=together, shares=(60, 20, 20), seed=0)
    assert len({*splits.values()}) > 1
    assert all(splits[a] == splits[b] for a, b in together)


def test_pairs_of_one_clean_picture_stay_in_one_split():
    entries = [
        Record(f"{i}.png", f"t{i}.png", "derain", ("x",), f"g{i}", digests=[f"s{i}", f"t{i % 6}"])
        for i in range(60)
    ]
    found = defaultdict(set)
    for entry in _split(entries, {}, shares=(60, 20, 20), seed=0):
        found[entry.digests[1]].add(entry.split)
    assert len(found) == 6 and all(len(splits) == 1 for splits in found.values())
