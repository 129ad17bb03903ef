"""Contact sheets."""

import numpy as np
import pytest
from PIL import Image

from ipx2p.errors import InputError
from ipx2p.sheets import contact_sheet, text_tile

ORIENTATION = 0x0112


def test_contact_sheet_shows_every_picture_in_its_place():
    colors = [["red", "lime"], ["blue", None]]
    rows = [[color and Image.new("RGB", (64, 64), color) for color in row] for row in colors]
    sheet = contact_sheet(rows, column_labels=["a", "b"], row_labels=["x", "y"], title="t", cell=96)
    pixels = np.asarray(sheet)
    places = {}
    for color, rgb in {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}.items():
        ys, xs = np.nonzero((pixels == rgb).all(-1))
        assert len(ys) == 96 * 96  # enlarged to the cell, covered by nothing
        places[color] = (xs.min(), ys.min())
    assert places["red"][1] == places["lime"][1] and places["red"][0] == places["blue"][0]
    empty = pixels[places["blue"][1] :, places["lime"][0] :]
    assert (empty == 255).all()


def test_contact_sheet_letterboxes_and_never_distorts():
    wide, tall = Image.new("RGB", (400, 100), "red"), Image.new("RGB", (50, 100), "blue")
    sheet = contact_sheet([[wide, tall]], column_labels=["", ""], row_labels=[""], cell=200)
    pixels = np.asarray(sheet)
    for rgb, (width, height) in {(255, 0, 0): (200, 50), (0, 0, 255): (100, 200)}.items():
        ys, xs = np.nonzero((pixels == rgb).all(-1))
        assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == (width, height)


def test_contact_sheet_turns_pictures_upright():
    picture = Image.new("RGB", (40, 20), "red")
    picture.getexif()[ORIENTATION] = 6
    sheet = contact_sheet([[picture]], column_labels=[""], row_labels=[""], cell=100)
    ys, xs = np.nonzero((np.asarray(sheet) == (255, 0, 0)).all(-1))
    assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == (50, 100)


@pytest.mark.parametrize("text", ["many words " * 60, "one_word_without_a_space" * 30, "W" * 500])
def test_long_labels_stay_off_the_pictures(text):
    red = Image.new("RGB", (128, 128), "red")
    rows = [[red, red], [red, red]]
    short = contact_sheet(rows, column_labels=["a", "b"], row_labels=["x", "y"], cell=128)
    sheet = contact_sheet(
        rows, column_labels=[text, text], row_labels=[text, text], title=text, cell=128
    )
    assert (np.asarray(sheet) == (255, 0, 0)).all(-1).sum() == 4 * 128 * 128
    assert sheet.width < short.width + 128 and sheet.height < short.height + 3 * 128


@pytest.mark.parametrize(
    ("rows", "columns", "labels"),
    [([], ["a"], []), ([[None]], [], ["x"]), ([[None]], ["a", "b"], ["x"]), ([[None]], ["a"], [])],
)
def test_contact_sheet_refuses_labels_that_do_not_match(rows, columns, labels):
    with pytest.raises(InputError, match="contact sheet: expected"):
        contact_sheet(rows, column_labels=columns, row_labels=labels)


def test_a_tile_says_in_words_what_there_is_no_picture_of():
    tile, empty = (np.asarray(text_tile(text, 96)) for text in ("not finite", ""))
    assert tile.shape == (96, 96, 3) and (empty == 210).all()
    ys, xs = np.nonzero((tile < 100).all(-1))
    assert len(ys) > 20 and abs(ys.mean() - 48) < 8 and abs(xs.mean() - 48) < 8
