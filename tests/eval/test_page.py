"""The page: one file that needs nothing else, and says what it was given."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from ipx2p.eval.curves import Curve
from ipx2p.eval.grids import Tile
from ipx2p.eval.page import LOSSLESS, Shown, make_page
from ipx2p.eval.tables import Cell, Table

NOTHING = {"about": {}, "notes": [], "remarks": [], "lesser": [], "tables": [], "curves": []}


class Reader(HTMLParser):
    """Everything that a page points to, its elements with their attributes, and its words."""

    def __init__(self, text):
        super().__init__()
        self.links, self.elements, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href", "srcset", "data") if name in attrs]
        self.elements.append((tag, attrs))

    def handle_data(self, data):
        self.words += data

    def all(self, tag, kind=None):
        """Attributes of the elements of a tag, and class."""
        found = [attrs for name, attrs in self.elements if name == tag]
        return [one for one in found if kind is None or kind in one.get("class", "").split()]


def page_of(**given):
    return make_page("Title", **NOTHING | {"shown": []} | given)


@pytest.fixture
def pictures(tmp_path, coffee):
    """A small one, another small one, and one with more pixels than are kept lossless."""
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    coffee.save(paths[0])
    coffee.rotate(90).save(paths[1])
    coffee.resize((300, 260)).save(paths[2])
    return paths


def test_the_page_points_nowhere_and_its_pictures_are_whole(pictures):
    small, _, large = pictures
    tiles = {"": [Tile("source", small), Tile("a", large, "PSNR 20.00")]}
    sheet = small.with_suffix(".jpg")
    Image.open(small).convert("RGB").save(sheet)
    png = small.read_bytes()
    text = page_of(shown=[Shown("cat", "snow", tiles, {"s": sheet})], curves=[Curve("c", "C", png)])
    page = Reader(text)
    assert not re.search(r"https?://|url\(|@import|<link", text)
    kinds = []
    for link in page.links:
        kind, _, data = link.partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
            assert kind == f"data:image/{image.format.lower()}"
            kinds.append(image.format)
    assert kinds == ["PNG", "JPEG", "PNG", "JPEG"]  # two tiles, a curve, a sheet


def test_small_pictures_lose_nothing_and_large_ones_little(pictures):
    small, _, large = pictures
    page = Reader(page_of(shown=[Shown("x", "", {"": [Tile("a", small), Tile("b", large)]}, {})]))
    shown = [Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) for link in page.links]
    with Image.open(small) as original:
        assert shown[0].tobytes() == original.tobytes()
    assert LOSSLESS < 300 * 260 and shown[1].size == (300, 260)
    assert shown[1].layer[0][1:3] == (1, 1)  # colours at full resolution


def test_a_picture_that_several_rows_show_is_embedded_once(pictures):
    a, b, _ = pictures
    rows = {"": [Tile("source", a), Tile("m", b)], "At equal scales": [Tile("m", b)]}
    page = Reader(page_of(shown=[Shown("x", "", rows, {})]))
    assert len(page.links) == 2 and "At equal scales" in page.words
    [again] = [one for one in page.all("img") if "data-same" in one]
    assert again["data-same"] in {one.get("id") for one in page.all("img")}
    assert [one["data-label"] for one in page.all("button", "tile")] == ["source", "m", "m"]


def test_an_edit_that_is_not_finite_cannot_be_clicked():
    page = Reader(page_of(shown=[Shown("x", "", {"": [Tile("m", None)]}, {})]))
    assert "not finite" in page.words and not page.all("button", "tile")


def test_pictures_without_a_mouse():
    """Tiles and headings are buttons, the slider is an input with a name."""
    table = Table("T", [], ["h"], [[Cell("1", 1.0)]])
    page = Reader(page_of(tables=[table]))
    [slider] = [one for one in page.all("input") if one.get("id") == "slide"]
    assert slider["type"] == "range" and slider["aria-label"]
    assert {one.get("id") for one in page.all("select")} == {"left", "right", "zoom"}
    assert [tag for tag, _ in page.elements if tag in ("th", "button")][:2] == ["th", "button"]


def test_cells_have_a_value_to_sort_by_an_interval_and_a_verdict():
    cells = [Cell("20.10", 20.1, "[19.0, 21.0]", "better"), Cell("", ""), Cell("ip2p", "ip2p")]
    cells += [Cell("inf", float("inf")), Cell("-inf", -float("inf"))]
    table = Table("Numbers", ["How to read."], list("abcde"), [cells, cells], marked=[1])
    page = Reader(page_of(tables=[table]))
    values = [one["data-value"] for one in page.all("td")]
    assert values == ["20.1", "", "ip2p", "Infinity", "-Infinity"] * 2
    assert page.all("td", "number")[0]["class"] == "number better"
    assert "[19.0, 21.0]" in page.words and "How to read." in page.words
    assert len(page.all("tr", "marked")) == 1 and len(page.all("th")) == 5


def test_words_come_before_numbers():
    told = {"notes": ["a note"], "remarks": ["a remark"], "lesser": ["x", "y"]}
    text = page_of(**told, tables=[Table("T", [], ["h"], [])], about={"models": "m"})
    places = [text.index(part) for part in ("<dt>models", "a note", "a remark", "2 more", "<table")]
    assert places == sorted(places)
    assert "In words" not in page_of() and "Pictures" not in page_of()


def test_what_people_type_is_escaped(pictures):
    nasty = "<script>alert(1)</script> \" onload='x'"
    cell = Cell(nasty, nasty, nasty)
    text = make_page(
        nasty,
        about={nasty: nasty},
        notes=[nasty],
        remarks=[nasty],
        lesser=[nasty],
        tables=[Table(nasty, [nasty], [nasty], [[cell]])],
        curves=[Curve(nasty, nasty, b"")],
        shown=[Shown(nasty, nasty, {nasty: [Tile(nasty, pictures[0], nasty)]}, {})],
    )
    assert "<script>alert" not in text
    assert not any("onload" in attrs for _, attrs in Reader(text).elements)
