"""Manifests, photographs, and the geometry that both pictures of a pair share."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ipx2p.data.degradations.tasks import DegradeConfig
from ipx2p.data.listing import find_photos
from ipx2p.data.pairs import (
    DegradedPhotos,
    ManifestPairs,
    PictureCache,
    centre_geometry,
    random_geometry,
)
from ipx2p.errors import InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def whole(size):
    return centre_geometry(size, 16)


def gradient(width, height):
    """A picture whose red says x and whose green says y."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), np.zeros_like(x)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def write_manifest(folder, *lines):
    path = folder / "train.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def line(**changes):
    return {
        "source": "a.png",
        "target": "b.png",
        "instruction": "derain the image",
        "task": "derain",
    } | changes


@pytest.fixture
def folder(tmp_path):
    gradient(40, 24).save(tmp_path / "a.png")
    gradient(40, 24).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "b.png")
    return tmp_path


# Geometry


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (1, 1), (17, 400)])
def test_cuts_stay_inside_and_keep_the_aspect(size):
    for seed in range(50):
        geometry = random_geometry(size, 16, seeded(seed), max_zoom=2.0)
        left, top, right, bottom = geometry.box
        assert 0 <= left <= right <= size[0] + 1e-6 and 0 <= top <= bottom <= size[1] + 1e-6
        assert right - left == pytest.approx(bottom - top)
        assert min(size) / 2 - 1e-6 <= right - left <= min(size) + 1e-6


def test_zoom_and_place_and_flip_vary():
    cuts = [random_geometry((40, 24), 16, seeded(seed), max_zoom=2.0) for seed in range(100)]
    assert 30 < sum(cut.flip for cut in cuts) < 70
    sides = [cut.box[2] - cut.box[0] for cut in cuts]
    assert min(sides) < 14 and max(sides) > 22
    assert max(cut.box[0] for cut in cuts) > 20 and min(cut.box[0] for cut in cuts) < 4
    assert not any(random_geometry((9, 9), 4, seeded(s), flip=False).flip for s in range(50))


def test_both_pictures_of_a_pair_are_cut_and_flipped_alike(folder):
    Image.open(folder / "a.png").save(folder / "b.png")
    pairs = ManifestPairs(write_manifest(folder, line()))
    flips = 0
    for seed in range(30):
        draws = seeded(seed)
        pair = pairs.get(0, lambda s, d=draws: random_geometry(s, 16, d, max_zoom=2.0), draws)
        assert torch.equal(pair.source_pixels01, pair.target_pixels01)
        flips += bool(pair.source_pixels01[0, 0, 0] > pair.source_pixels01[0, 0, -1])
    assert 5 < flips < 25


def test_centre_cut_is_the_middle_square():
    cut = centre_geometry((40, 24), 24)
    assert cut.box == (8, 0, 32, 24) and not cut.flip
    picture = gradient(40, 24)
    expected = torch.from_numpy(np.asarray(picture)[:, 8:32].copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(cut.apply(picture), expected)


# Manifests


def test_manifest_gives_pairs_with_paths_relative_to_it(folder):
    (folder / "pictures").mkdir()
    (folder / "a.png").rename(folder / "pictures" / "a.png")
    path = write_manifest(folder, line(source="pictures/a.png"), "", line(source="b.png"))
    pairs = ManifestPairs(path)
    assert len(pairs) == 2 and pairs.task(0) == "derain"
    pair = pairs.get(0, whole, seeded())
    assert pair.source_pixels01.shape == pair.target_pixels01.shape == (3, 16, 16)
    torch.testing.assert_close(
        pair.source_pixels01, pair.target_pixels01.flip(-1, -2), atol=0.02, rtol=0
    )
    assert (pair.instruction, pair.task) == ("derain the image", "derain")


def test_one_of_several_instructions_is_drawn(folder):
    pairs = ManifestPairs(write_manifest(folder, line(instruction=["one", "two", "three"])))
    drawn = [pairs.get(0, whole, seeded(seed)).instruction for seed in range(60)]
    assert all(10 <= drawn.count(word) <= 35 for word in ("one", "two", "three"))


def test_line_separators_inside_sentences_do_not_split_lines(folder):
    text = json.dumps(line(instruction="de\u2028rain"), ensure_ascii=False)
    path = folder / "train.jsonl"
    path.write_text(text + "\n", encoding="utf-8")
    assert len(ManifestPairs(path)) == 1


def test_a_byte_order_mark_is_passed_over(folder):
    path = folder / "train.jsonl"
    path.write_text(json.dumps(line()), encoding="utf-8-sig")
    assert len(ManifestPairs(path)) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"line 2 is not JSON"),
        ("[1]", r"line 2 holds a list, expected an object"),
        (line(source=None), r"line 2: 'source' is None, expected a string"),
        (line(target=3), r"line 2: 'target' is 3"),
        (line(task=""), r"line 2: 'task' is ''"),
        (line(instruction=" "), r"line 2: 'instruction' is ' ', expected a sentence"),
        (line(instruction=[]), r"line 2: 'instruction' is \[\]"),
        (line(instruction=["a", 3]), r"line 2: 'instruction' is"),
        (line(instruction="half \ud83d"), r"line 2: 'instruction' is not valid Unicode text"),
        ("[" * 100_000, r"line 2 is not JSON"),
        ("9" * 5000, r"line 2 is not JSON"),
    ],
)
def test_bad_lines_are_refused_by_number(folder, bad, message):
    with pytest.raises(InputError, match=message):
        ManifestPairs(write_manifest(folder, line(), bad))


def test_missing_and_empty_manifests_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"manifest .*no\.jsonl does not exist"):
        ManifestPairs(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="lists no pairs"):
        ManifestPairs(tmp_path / "empty.jsonl")


def test_pictures_that_cannot_be_used_are_named_with_their_line(folder):
    pairs = ManifestPairs(write_manifest(folder, line(target="gone.png"), line(target="c.png")))
    with pytest.raises(
        InputError, match=r"train\.jsonl line 1: .*gone\.png: cannot be read \(No such file"
    ):
        pairs.get(0, whole, seeded())
    gradient(40, 20).save(folder / "c.png")
    with pytest.raises(InputError, match=r"line 2: .*a\.png is 40 x 24, .*c\.png is 40 x 20"):
        pairs.get(1, whole, seeded())


# Photographs


def test_every_photo_is_paired_with_every_task(folder):
    photos = find_photos(folder)
    pairs = DegradedPhotos(photos, ["denoise", "enhance"], DegradeConfig())
    assert len(pairs) == 4
    seen = [(pairs.task(i), pairs.get(i, whole, seeded())) for i in range(4)]
    assert [task for task, _ in seen] == ["denoise", "enhance"] * 2
    for task, pair in seen:
        assert pair.task == task and pair.source_pixels01.shape == pair.target_pixels01.shape
        assert (pair.source_pixels01 - pair.target_pixels01).abs().max() > 0.05
    assert torch.equal(seen[0][1].target_pixels01, seen[1][1].target_pixels01)
    assert seen[1][1].source_pixels01.mean() < 0.6 * seen[1][1].target_pixels01.mean()


def test_photos_are_found_in_order_of_their_names(folder):
    (folder / "deep").mkdir()
    gradient(9, 9).save(folder / "deep" / "z.JPEG")
    (folder / "notes.txt").write_text("x")
    assert [p.name for p in find_photos(folder)] == ["a.png", "b.png", "z.JPEG"]


def test_files_that_systems_hide_are_no_photos(folder):
    (folder / "._a.png").write_bytes(b"x")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.png").write_bytes(b"x")
    assert [p.name for p in find_photos(folder)] == ["a.png", "b.png"]


def test_folders_without_photos_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder of photographs"):
        find_photos(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no pictures, expected .*jpeg"):
        find_photos(tmp_path)


def test_cache_keeps_within_its_budget(folder):
    cache = PictureCache(budget=3 * 40 * 24 + 10)
    for _ in range(2):
        for name in ("a.png", "b.png"):
            assert cache.load(folder / name).size == (40, 24)
    assert [path.name for path in cache.images] == ["a.png"]


def test_pairs_can_be_sent_to_workers(folder):
    manifest = ManifestPairs(write_manifest(folder, line()))
    photos = DegradedPhotos(find_photos(folder), ["denoise"], DegradeConfig())
    for pairs in (manifest, photos):
        copied = pickle.loads(pickle.dumps(pairs))
        one, other = (p.get(0, whole, seeded()) for p in (pairs, copied))
        assert torch.equal(one.source_pixels01, other.source_pixels01)
