"""The report as one page that opens from disk and needs nothing else (layer 4)."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from ipx2p.eval.curves import Curve
from ipx2p.eval.grids import Tile
from ipx2p.eval.page_parts import SCRIPT, STYLE, VIEWER
from ipx2p.images import SAVE_OPTIONS, load_image

LOSSLESS = 256 * 256  # pixels of a picture; larger ones become JPEG of high quality


class Cell(NamedTuple):
    """One cell of a table: its text, a number or word to sort by, and what it says in colour.

    beside: smaller, behind the text. verdict: "better", "worse" or "".
    """

    text: str
    value: float | str | None = None
    beside: str = ""
    verdict: str = ""


class Table(NamedTuple):
    """A table: title, what it says in words, headings, rows, and the rows that are set off."""

    title: str
    about: Sequence[str]
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: Sequence[int] = ()
    is_open: bool = True


class Shown(NamedTuple):
    """Everything to see of one case: rows of tiles by title, and sheets by name."""

    name: str
    about: str
    rows: dict[str, list[Tile]]
    sheets: dict[str, Path]


def make_page(
    title: str,
    *,
    about: dict[str, str],
    notes: Sequence[str],
    remarks: Sequence[str],
    lesser: Sequence[str],
    tables: Sequence[Table],
    curves: Sequence[Curve],
    shown: Sequence[Shown],
) -> str:
    """The whole report as HTML.

    Args:
        about: what was compared, by name. notes: what is missing, and how to get it.
        remarks: what the numbers say, in words. lesser: likewise, of lines that matter less.
    """
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in about.items())
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<details open><summary>What was compared, and how</summary><dl>{facts}</dl></details>",
        _words("Notes", notes),
        _words("In words", remarks, lesser),
        *map(_table, tables),
    ]
    if shown:
        parts.append(
            "<h2>Pictures</h2><p class='controls'>Click a picture to compare it with any other: "
            "a slider, at full size. <label>Size here <input type='range' id='size' min='120' "
            "max='640' value='300'></label></p>"
        )
    numbers: dict[Path, str] = {}
    parts += [_case(case, numbers) for case in shown]
    if curves:
        parts.append("<h2>Curves</h2>")
        parts += [_figure(curve.png, "png", curve.caption) for curve in curves]
    if any(case.sheets for case in shown):
        parts.append("<h2>All scales</h2><p>Click a sheet to see it at full size.</p>")
    for case in shown:
        sheets = "".join(
            _figure(path.read_bytes(), "jpeg", name, show=False)
            for name, path in case.sheets.items()
        )
        if sheets:
            parts.append(f"<details><summary>{escape(case.name)}</summary>{sheets}</details>")
    parts.append(f"{VIEWER}<script>{SCRIPT}</script></body></html>\n")
    return "\n".join(part for part in parts if part)


def _words(title: str, texts: Sequence[str], lesser: Sequence[str] = ()) -> str:
    items, more = ("".join(f"<li>{escape(one)}</li>" for one in some) for some in (texts, lesser))
    rest = f"<details><summary>{len(lesser)} more</summary><ul>{more}</ul></details>" * bool(more)
    return f"<h2>{title}</h2><ul>{items}</ul>{rest}" if items or more else ""


def _table(table: Table) -> str:
    heads = "".join(f"<th scope='col'><button>{escape(head)}</button></th>" for head in table.heads)
    rows = "".join(
        f"<tr{' class=marked' if index in table.marked else ''}>{''.join(map(_cell, row))}</tr>"
        for index, row in enumerate(table.rows)
    )
    said = "".join(f"<p>{escape(text)}</p>" for text in table.about)
    return (
        f"<details class='table'{' open' * table.is_open}><summary><h2>{escape(table.title)}</h2>"
        f"</summary>{said}<div class='scroll'><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _cell(cell: Cell) -> str:
    value = cell.text if cell.value is None else cell.value
    kinds = ["number"] * isinstance(value, (int, float)) + [cell.verdict] * bool(cell.verdict)
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    raw = str(value).replace("inf", "Infinity") if isinstance(value, float) else str(value)
    beside = f" <small>{escape(cell.beside)}</small>" if cell.beside else ""
    return f'<td{kind} data-value="{escape(raw)}">{escape(cell.text)}{beside}</td>'


def _case(case: Shown, numbers: dict[Path, str]) -> str:
    rows = []
    for title, tiles in case.rows.items():
        head = f"<h4>{escape(title)}</h4>" if title else ""
        shown = "".join(_tile(tile, numbers) for tile in tiles)
        rows.append(f"{head}<div class='tiles'>{shown}</div>")
    return (
        f'<section class="case" data-name="{escape(case.name)}"><h3>{escape(case.name)}</h3>'
        f"<p>{escape(case.about)}</p>{''.join(rows)}</section>"
    )


def _tile(tile: Tile, numbers: dict[Path, str]) -> str:
    """A button with its picture, which is embedded once: later tiles name the first."""
    below = f"<span><b>{escape(tile.label)}</b> {escape(tile.note)}</span>"
    if tile.path is None:
        return f"<div class='tile'><div class='none'>not finite</div>{below}</div>"
    if tile.path in numbers:
        source = f'data-same="{numbers[tile.path]}"'
    else:
        numbers[tile.path] = f"p{len(numbers)}"
        source = f'id="{numbers[tile.path]}" src="{_embedded(tile.path)}"'
    label = escape(tile.label)
    return f'<button class="tile" data-label="{label}"><img {source} alt="{label}">{below}</button>'


def _embedded(path: Path) -> str:
    image = load_image(path)
    kind = ".png" if image.width * image.height <= LOSSLESS else ".jpg"
    file = io.BytesIO()
    image.save(file, **SAVE_OPTIONS[kind])
    name = {".png": "png", ".jpg": "jpeg"}[kind]
    return f"data:image/{name};base64,{base64.b64encode(file.getvalue()).decode()}"


def _figure(content: bytes, kind: str, caption: str, *, show: bool = True) -> str:
    data = base64.b64encode(content).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if show else ""
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(caption)}">'
        f"{below}</figure>"
    )
