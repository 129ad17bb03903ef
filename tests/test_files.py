"""Files that are whole or not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipx2p.errors import InputError
from ipx2p.files import (
    atomic_write,
    check_writable,
    digest_bytes,
    digest_file,
    hash_bytes,
    hasher,
    read_json,
    remove_stale_temporaries,
    write_json,
)


def test_json_is_written_indented(tmp_path):
    write_json({"a": [1, None], "b": "é"}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None], "b": "é"}
    assert (tmp_path / "a.json").read_text().startswith('{\n  "a"')


def test_the_file_is_flushed_before_it_replaces_the_earlier_one(tmp_path, monkeypatch):
    events, path = [], tmp_path / "a.json"
    path.write_text("earlier")
    flush, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flush"), flush(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    with atomic_write(path) as temporary:
        temporary.write_text("later")
        assert path.read_text() == "earlier" and temporary.parent == path.parent
    assert events == ["flush", "replace", "flush"]
    assert path.read_text() == "later"


def test_an_error_in_the_block_leaves_the_earlier_file_and_nothing_else(tmp_path):
    (tmp_path / "a.json").write_text("earlier")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("later")
        _ = 1 / 0
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "earlier"


def test_folders_are_made_as_needed(tmp_path):
    write_json({"a": 1}, tmp_path / "x" / "y" / "a.json")
    assert read_json(tmp_path / "x" / "y" / "a.json") == {"a": 1}
    check_writable(tmp_path / "z" / "deep")
    assert os.listdir(tmp_path / "z" / "deep") == []


@pytest.mark.parametrize("place", ["file/inside", "/proc/inside"])
def test_places_that_cannot_be_written_are_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .*choose another place"):
        check_writable(tmp_path / place)
    with pytest.raises(InputError, match="cannot write .*choose another place"):
        write_json({}, tmp_path / place / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "is not JSON: .*line 1"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
    ],
)
def test_bad_json_is_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json {message}"):
        read_json(path)


def test_a_json_list_is_read_where_one_is_expected(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    assert read_json(path, list) == [1, 2]
    path.write_text("{}")
    with pytest.raises(InputError, match=r"a\.json holds a JSON dict, expected a list"):
        read_json(path, list)


def test_temporaries_of_killed_processes_are_swept_and_others_stay(tmp_path):
    killed = "import os; from ipx2p.files import atomic_write as w\n"
    killed += f"with w({str(tmp_path / 'a.json')!r}): os._exit(9)"
    subprocess.run([sys.executable, "-c", killed])
    assert len(os.listdir(tmp_path)) == 1
    for name in (".0123456789abcdef.jsonl", ".12345678-1-0123456789abcdef.json"):
        (tmp_path / name).touch()  # of a version before, and of another machine
    foreign = sorted(os.listdir(tmp_path))[:2]
    (tmp_path / ".hidden").touch()
    with atomic_write(tmp_path / "b.json") as ours:
        remove_stale_temporaries(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted([*foreign, ".hidden", ours.name])
    for name in foreign:
        os.utime(tmp_path / name, (0, 0))
    remove_stale_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "b.json"]


def test_hashes_on_disk_keep_their_values(tmp_path):
    (tmp_path / "a").write_bytes(b"rain")
    assert digest_bytes(b"rain") == digest_file(tmp_path / "a")
    assert digest_bytes(b"rain") == "1a9b85535cffc05c0aeaa242e5b550bd"
    assert hash_bytes(b"rain", 8).hex() == digest_bytes(b"rain", 8) == "3d09e514ecfd42df"
    content = hasher()
    content.update(b"rain")
    assert content.hexdigest() == digest_bytes(b"rain", 64)
