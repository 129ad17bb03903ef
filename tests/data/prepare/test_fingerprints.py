"""Fingerprints: copies of a picture are found, other pictures are not."""

from io import BytesIO
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image, ImageEnhance

from ipx2p.data.prepare.fingerprints import fingerprint, near_copies
from ipx2p.images import load_image

PHOTOS = sorted((Path(__file__).parents[3] / "assets" / "photos").glob("*.jpg"))


@pytest.fixture(scope="module")
def photos():
    return [load_image(path) for path in PHOTOS]


def squeezed(image):
    """As a JPEG of quality 30."""
    file = BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def halved(image):
    return image.resize((image.width // 2, image.height // 2))


def brighter(image):
    return ImageEnhance.Brightness(image).enhance(1.04)


@pytest.mark.parametrize("change", [squeezed, halved, brighter])
def test_a_changed_copy_is_found(photos, change):
    prints = [fingerprint(image) for image in photos]
    for place, image in enumerate(photos):
        assert [*near_copies([prints[place], fingerprint(change(image))])] == [(0, 1)]
    found = {*near_copies([*prints, *(fingerprint(change(image)) for image in photos)])}
    assert found == {(place, place + len(photos)) for place in range(len(photos))}


def test_different_photographs_are_no_copies(photos):
    assert [*near_copies([fingerprint(image) for image in photos])] == []


def test_a_mirrored_photograph_is_no_copy(photos):
    mirrored = photos[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert [*near_copies([fingerprint(photos[0]), fingerprint(mirrored)])] == []


def test_flat_pictures_are_told_apart_by_their_colour():
    flat = [Image.new("RGB", (32, 32), colour) for colour in ("white", "black", "red", "#fefefe")]
    assert [*near_copies([fingerprint(image) for image in flat])] == [(0, 3)]


def test_each_of_many_equal_pictures_is_named(photos):
    prints = [fingerprint(photos[0])] * 4
    assert [*near_copies(prints)] == [(0, 1), (0, 2), (0, 3)]


def test_there_are_no_copies_among_none():
    assert [*near_copies([])] == []


def test_a_chain_of_bits_is_followed_as_far_as_it_reaches():
    base = bytes(16) + bytes(48)
    seven = bytes([0b1111111]) + base[1:]  # 7 bits away from the first
    eight = bytes([0b11111111]) + base[1:]
    prints = [data.hex() for data in (base, seven, eight)]
    assert {*near_copies(prints)} == {(0, 1), (1, 2)}
    assert all({*near_copies([a, b])} for a, b in combinations(prints[:2], 2))
