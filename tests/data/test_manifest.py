"""Manifests: their index, what makes it stale, and what is read of them. Bad lines: test_pairs."""

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest

import ipx2p.data.manifest
from ipx2p.data.manifest import Manifest, hash64
from ipx2p.data.pairs import ManifestPairs, Pairs
from ipx2p.errors import InputError

COUNT = 600
TASKS = ("derain", "denoise", "deblur")


def line(number, **changes):
    return {
        "source": f"in/{number}.jpg",
        "target": f"out/{number}.jpg",
        "instruction": [f"repair number {number}", "r\u00e9parer"] if number % 2 else "repair it",
        "task": TASKS[number % 3],
    } | changes


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture(autouse=True)
def short_manifests_are_indexed(monkeypatch):
    monkeypatch.setattr(ipx2p.data.manifest, "MIN_INDEXED", COUNT // 2)


@pytest.fixture(scope="module")
def content():
    return "".join(f"{json.dumps(line(number))}\n\n" for number in range(COUNT))


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    return path


@pytest.fixture
def parsed(monkeypatch):
    """How many lines were parsed: gives the number since it was last asked."""
    parse, calls = ipx2p.data.manifest.parse, []
    monkeypatch.setattr(ipx2p.data.manifest, "parse", lambda text: calls.append(1) or parse(text))

    def parsed():
        count = len(calls)
        calls.clear()
        return count

    return parsed


def index_of(path):
    return path.with_name(".train.jsonl.index.npz")


def test_records_are_those_of_the_lines(path):
    manifest = Manifest(path)
    assert len(manifest) == COUNT and manifest.tasks == [*TASKS]
    for item in (0, 1, 377, COUNT - 1):
        record = manifest[item]
        assert record.source == f"in/{item}.jpg" and record.task == TASKS[item % 3]
        assert record.instructions[0] == (f"repair number {item}" if item % 2 else "repair it")
        assert manifest.task(item) == record.task
        assert manifest.where(item) == f"{path} line {1 + 2 * item}"


def test_the_second_opening_parses_nothing_and_finds_the_same(path, parsed):
    first = Manifest(path)
    assert parsed() == COUNT and index_of(path).exists()
    second = Manifest(path)
    assert parsed() == 0
    for one, other in zip(first.index, second.index, strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert second[COUNT - 1] == first[COUNT - 1]


def test_a_small_manifest_leaves_nothing_beside_it(tmp_path):
    path = write(tmp_path / "train.jsonl", [line(0)])
    assert len(Manifest(path)) == 1 and [*tmp_path.iterdir()] == [path]


def test_an_index_of_other_content_is_made_anew(path, content, parsed):
    Manifest(path)
    parsed()
    path.write_text(content.replace("number 377", "number 378"))  # as long as before
    assert Manifest(path)[377].instructions[0] == "repair number 378"
    assert parsed() > COUNT
    Manifest(path)
    assert parsed() == 0


def test_an_index_of_another_format_is_made_anew(path, parsed, monkeypatch):
    Manifest(path)
    parsed()
    monkeypatch.setattr(ipx2p.data.manifest, "FORMAT", 2)
    Manifest(path)
    assert parsed() == COUNT


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "folder"])
def test_a_damaged_index_is_made_anew(path, parsed, kind):
    before = Manifest(path)
    index = index_of(path)
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.unlink()
    if kind == "folder":
        index.mkdir()
    else:
        index.write_bytes({"flipped": content, "cut": content[:-50], "empty": b""}[kind])
    parsed()
    again = Manifest(path)
    assert parsed() == COUNT
    assert all(np.array_equal(*both) for both in zip(before.index, again.index, strict=True))
    if kind != "folder":
        Manifest(path)
        assert parsed() == 0


def test_what_a_killed_write_left_beside_a_manifest_is_removed(path):
    left = path.with_name(".0123456789abcdef.npz")
    left.touch()
    os.utime(left, (0, 0))
    Manifest(path)
    assert sorted(path.parent.iterdir()) == [index_of(path), path]


def test_a_folder_that_cannot_be_written_does_not_matter(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ipx2p.data.manifest.np, "savez", refuse)
    assert len(Manifest(path)) == COUNT
    assert [*path.parent.iterdir()] == [path]


def test_bad_lines_are_found_at_the_first_opening_however_late_they_come(path, content):
    path.write_text(content + json.dumps(line(0, source=3)))
    with pytest.raises(InputError, match=rf"line {2 * COUNT + 1}: 'source' is 3"):
        Manifest(path)
    assert not index_of(path).exists()


def test_a_manifest_that_changes_under_a_run_is_noticed(tmp_path):
    path = write(tmp_path / "train.jsonl", [line(0), line(1)])
    manifest = Manifest(path)
    for changes in ({"source": "ni/1.jpg"}, {"instruction": "other"}):
        write(path, [line(0), line(1, **changes)])
        assert manifest[0].source == "in/0.jpg"
        with pytest.raises(InputError, match=r"train\.jsonl line 2: the file changed"):
            manifest[1]
    path.write_text("")
    with pytest.raises(InputError, match=r"train\.jsonl line 1: the file changed"):
        manifest[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            line(0, source="/data/a.png"),
            r"'source' is the absolute path /data/a\.png: write",
        ),
        (line(0, target="/b.png"), r"'target' is the absolute path /b\.png"),
        (line(0, source="half \ud83d.png"), r"'source' is not valid Unicode text"),
        (line(0, instruction=["a", "b\0"]), r"'instruction' has a null character"),
        ({}, r"'source' is None, expected a string"),
    ],
)
def test_what_no_pair_can_be_is_refused_with_its_line(tmp_path, bad, message):
    path = write(tmp_path / "train.jsonl", [line(1), bad])
    with pytest.raises(InputError, match=rf"train\.jsonl line 2: {message}"):
        Manifest(path)


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path):
    path = write(tmp_path / "train.jsonl", [line(1)])
    path.write_bytes(path.read_bytes() + b'{"source": "\xff"}')
    with pytest.raises(InputError, match=r"train\.jsonl line 2 is not UTF-8 text"):
        Manifest(path)


def test_paths_may_lead_out_of_the_folder(tmp_path):
    path = write(tmp_path / "train.jsonl", [line(0, source="../a.png")])
    assert ManifestPairs(path).files(0)[0] == tmp_path / ".." / "a.png"


def test_what_the_index_says_of_all_pairs_is_what_each_pair_says(tmp_path):
    path = write(tmp_path / "train.jsonl", [line(number) for number in (5, 3, 8, 4, 2)])
    pairs = ManifestPairs(path)
    found, asked = pairs.by_task(), Pairs.by_task(pairs)
    assert [*found] == [*asked] == sorted(TASKS)
    assert all(found[task].tolist() == asked[task].tolist() for task in TASKS)
    assert np.array_equal(pairs.sentence_digests(), Pairs.sentence_digests(pairs))
    assert len({*pairs.digests().tolist()}) == 5


def test_digests_hang_on_the_pair_and_not_on_its_line(tmp_path):
    some, other = (
        ManifestPairs(write(tmp_path / f"{name}.jsonl", map(line, numbers)))
        for name, numbers in (("some", range(9)), ("other", [0, 7, 3]))
    )
    assert np.array_equal(some.digests()[[0, 7, 3]], other.digests())
    assert np.array_equal(some.sentence_digests()[[0, 7, 3]], other.sentence_digests())


def test_hashes_tell_lists_apart():
    lists = [["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ["a", " b"]]
    assert len({hash64(strings) for strings in lists}) == 5


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_records(tmp_path, method):
    manifest = Manifest(write(tmp_path / "train.jsonl", map(line, range(20))))
    expected = [manifest[item] for item in range(20)]  # the file is open now
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(manifest.__getitem__, range(20)) == expected
    assert pickle.loads(pickle.dumps(manifest))[3] == expected[3]
