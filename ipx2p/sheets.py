"""Contact sheets: labelled grids of pictures, to look at (layer 0)."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress

from PIL import Image, ImageDraw, ImageFont

from ipx2p.errors import InputError
from ipx2p.images import fit_size, resize, rgb_from_image

# With many letters, where installed: Linux, macOS, Windows
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    title: str | None = None,
    cell: int = 256,
) -> Image.Image:
    """A labelled grid of pictures.

    Every picture is resized to a long side of `cell` and centred in its cell; None leaves a cell
    empty. Columns are equally wide, rows as high as they need to be. Labels are wrapped, and end in
    "..." if they still do not fit. Labels that are all "" take no room.
    """
    _check_sheet(rows, column_labels, row_labels, cell)
    pictures = [[rgb_from_image(image) if image else None for image in row] for row in rows]
    tiles = [[p and resize(p, fit_size(*p.size, cell, 1)) for p in row] for row in pictures]
    least = cell // 2  # room for a label beside or above narrow pictures
    width = max([least, *(tile.width for row in tiles for tile in row if tile)])
    heights = [max([least, *(tile.height for tile in row if tile)]) for row in tiles]
    gap = max(6, cell // 32)
    font_size = min(24, max(14, cell // 14))

    labels_width = max(width * 3 // 4, 8 * font_size)
    side = [
        _text_picture(label, font_size, (labels_width, height))
        for label, height in zip(row_labels, heights, strict=True)
    ]
    top = [_text_picture(label, font_size, (width, least), centred=True) for label in column_labels]
    side_width = max(label.width for label in side)
    left = gap + (side_width + gap if side_width else 0)
    sheet_width = left + len(column_labels) * (width + gap)
    heading = _text_picture(title or "", font_size * 4 // 3, (sheet_width - 2 * gap, cell))
    labels_bottom = gap + heading.height + max(label.height for label in top)
    y = labels_bottom + (gap // 2 if labels_bottom > gap else 0)

    sheet = Image.new("RGB", (sheet_width, y + sum(heights) + gap * len(rows)), "white")
    lefts = [left + column * (width + gap) for column in range(len(column_labels))]
    sheet.paste(heading, (gap, gap))
    for x, label in zip(lefts, top, strict=True):
        sheet.paste(label, (x + (width - label.width) // 2, labels_bottom - label.height))
    for label, row, height in zip(side, tiles, heights, strict=True):
        sheet.paste(label, (gap, y + (height - label.height) // 2))
        for x, tile in zip(lefts, row, strict=True):
            if tile:
                sheet.paste((236, 236, 236), (x, y, x + width, y + height))
                sheet.paste(tile, (x + (width - tile.width) // 2, y + (height - tile.height) // 2))
        y += height + gap
    return sheet


def text_tile(text: str, cell: int) -> Image.Image:
    """A grey square with a word, in place of a missing picture."""
    tile = Image.new("RGB", (cell, cell), (210, 210, 210))
    label = _text_picture(text, max(12, cell // 10), (cell, cell), centred=True)
    tile.paste(label, ((cell - label.width) // 2, (cell - label.height) // 2))
    return tile


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font or, for letters beyond ASCII, one of the system's."""
    for name in () if text.isascii() else FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size=size)


def _check_sheet(rows: Sequence, column_labels: Sequence, row_labels: Sequence, cell: int) -> None:
    lengths = [len(row) for row in rows]
    if not column_labels or not rows or lengths != [len(column_labels)] * len(row_labels):
        raise InputError(
            f"contact sheet: expected {len(row_labels)} rows of {len(column_labels)} pictures, one "
            f"for each label, got rows of {lengths}: use None for an empty cell"
        )
    if cell < 32:
        raise InputError(f"contact sheet: cell must be at least 32 pixels, got {cell}")


def _text_picture(
    text: str, font_size: int, max_size: tuple[int, int], *, centred: bool = False
) -> Image.Image:
    """A picture of text, wrapped and cut to (width, height); no text is 0 x 0."""
    font = _font(text, font_size)
    line_height = sum(font.getmetrics()) + 2
    lines = _wrap(text, font, max_size[0], max(1, max_size[1] // line_height))
    width = max((math.ceil(font.getlength(line)) for line in lines), default=0)
    picture = Image.new("RGB", (width, len(lines) * line_height), "white")
    draw = ImageDraw.Draw(picture)
    for index, line in enumerate(lines):
        x = (width - font.getlength(line)) / 2 if centred else 0
        draw.text((x, index * line_height), line, font=font, fill=(20, 20, 20))
    return picture


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines of at most `width` pixels; longer words are cut, if possible after punctuation."""
    lines, line = [], ""
    for rest in text.split():
        while len(lines) <= max_lines and font.getlength(f"{line} {rest}".strip()) > width:
            if not line:
                fits = max(1, _count_fitting(rest, font, width))
                cut = max(rest.rfind(mark, 0, fits) for mark in ",;:=/_-") + 1 or fits
                line, rest = rest[:cut], rest[cut:]
            lines.append(line)
            line = ""
        line = f"{line} {rest}".strip()
    lines += [line] if line else []
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        last = last[: _count_fitting(last, font, width - font.getlength("..."))]
        lines[max_lines - 1 :] = [last.rstrip() + "..."]
    return lines


def _count_fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    lengths = range(1, len(text) + 1)  # the length in pixels grows with the number of characters
    return bisect_right(lengths, width, key=lambda count: font.getlength(text[:count]))
