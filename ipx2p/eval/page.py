"""The report as one page that opens from disk and needs nothing else (layer 4)."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from ipx2p.eval.curves import Curve
from ipx2p.eval.grids import Tile
from ipx2p.eval.tables import Cell, Table
from ipx2p.images import SAVE_OPTIONS, load_image

TEMPLATE = Path(__file__).parent / "page.html"
LOSSLESS = 256 * 256  # pixels of a picture; larger ones become JPEG of high quality
CONTROLS = (
    "<p class='controls'>Click a picture to compare it with any other: a slider, at full size. "
    "<label>Size here <input type='range' id='size' min='120' max='640' value='300'></label></p>"
)


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
    numbers: dict[Path, str] = {}
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in about.items())
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<details open><summary>What was compared, and how</summary><dl>{facts}</dl></details>",
        _words("Notes", notes),
        _words("In words", remarks, lesser),
        *map(_table, tables),
        f"<h2>Pictures</h2>{CONTROLS}" if shown else "",
        *(_case(case, numbers) for case in shown),
        "<h2>Curves</h2>" if curves else "",
        *(_figure(curve.png, "png", curve.name, curve.caption) for curve in curves),
    ]
    if sheets := [case for case in shown if case.sheets]:
        parts.append("<h2>All scales</h2><p>Click a sheet to see it at full size.</p>")
        parts += [
            f"<details><summary>{escape(case.name)}</summary>"
            + "".join(_figure(path.read_bytes(), "jpeg", n, "") for n, path in case.sheets.items())
            + "</details>"
            for case in sheets
        ]
    page = TEMPLATE.read_text(encoding="utf-8").replace("{title}", escape(title), 1)
    return page.replace("{body}", "\n".join(filter(None, parts)), 1)


def _words(title: str, texts: Sequence[str], lesser: Sequence[str] = ()) -> str:
    items, more = ("".join(f"<li>{escape(one)}</li>" for one in some) for some in (texts, lesser))
    rest = f"<details><summary>{len(lesser)} more</summary><ul>{more}</ul></details>" * bool(more)
    return f"<h2>{title}</h2><ul>{items}</ul>{rest}" if items or more else ""


def _table(table: Table) -> str:
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.heads)
    heads = "".join(
        f"<th scope='col'{' class=number' * any(map(_is_number, column))}>"
        f"<button>{escape(head)}</button></th>"
        for head, column in zip(table.heads, columns, strict=True)
    )
    rows = "".join(
        f"<tr{' class=marked' * (index in table.marked)}>{''.join(map(_cell, row))}</tr>"
        for index, row in enumerate(table.rows)
    )
    said = "".join(f"<p>{escape(text)}</p>" for text in table.about)
    return (
        f"<details class='table'{' open' * table.is_open}><summary><h2>{escape(table.title)}</h2>"
        f"</summary>{said}<div class='scroll'><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _is_number(cell: Cell) -> bool:
    return isinstance(cell.value, (int, float))


def _cell(cell: Cell) -> str:
    kind = " ".join(["number"] * _is_number(cell) + [cell.verdict] * bool(cell.verdict))
    kind = f' class="{kind}"' if kind else ""
    raw = str(cell.value).replace("inf", "Infinity") if _is_number(cell) else str(cell.value)
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
    return _data(file.getvalue(), {".png": "png", ".jpg": "jpeg"}[kind])


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _figure(content: bytes, kind: str, name: str, caption: str) -> str:
    image = f'<img src="{_data(content, kind)}" alt="{escape(name)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
