"""The report of a sweep as one self-contained page, pictures included (layer 4)."""

import base64
import math
from collections.abc import Sequence
from html import escape

from ipx2p.eval.curves import Curve
from ipx2p.eval.scores import METRICS
from ipx2p.eval.tables import COLUMNS, Line, columns_of, shown_value

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
       max-width: 1900px; padding: 1rem 2rem 4rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-height: 80vh; }
table { border-collapse: collapse; font-size: 13px; }
th { position: sticky; top: 0; background: #f3f3f3; cursor: pointer; text-align: left;
     vertical-align: bottom; min-width: 4.5em; user-select: none; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.identity { background: #fff8dc; }
th.up::after { content: " \\25b2"; } th.down::after { content: " \\25bc"; }
figure { margin: 1rem 0 2rem; overflow-x: auto; } figcaption { color: #444; max-width: 70em; }
img { max-width: 100%; height: auto; cursor: zoom-in; }
img.full { max-width: none; cursor: zoom-out; }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; }
code { font-size: 13px; }
"""
# A click on a heading sorts by its column, numbers as numbers, empty cells last; a click on a
# picture shows it at full size.
SCRIPT = """
for (const image of document.querySelectorAll("img"))
  image.addEventListener("click", () => image.classList.toggle("full"));
for (const [index, head] of [...document.querySelectorAll("th")].entries()) {
  head.addEventListener("click", () => {
    const up = !head.classList.contains("up");
    for (const other of head.parentNode.children) other.className = "";
    head.className = up ? "up" : "down";
    const body = document.querySelector("tbody");
    const value = (row) => row.cells[index].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    body.append(...rows);
  });
}
"""


EXPLAINED = {
    "effective_guidance_scale": "Effective scales: those at which ip2p is exactly the same; empty "
    "if there are none. Curves are drawn at them; panels have the scales that were set.",
    "failed": "Edits that are not finite are excluded from means.",
    "shared": "Shared with: these edits are the same computation as those of that line, and were "
    "made once.",
    "best": "Best scales by: the metrics by which these are the best scales of the scheme at this "
    "cost.",
}


def make_page(
    lines: Sequence[Line],
    grids: Sequence[tuple[str, str, bytes]],
    curves: Sequence[Curve],
    about: dict[str, str],
    notes: Sequence[str],
) -> str:
    """The whole report as HTML.

    Args:
        grids: name of the picture, name of the sheet, and the JPEG.
        about: what was compared, by name. notes: what is missing, and how to get it.
    """
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in about.items())
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Guidance compared</title><style>{STYLE}</style></head><body>",
        f"<h1>Guidance compared</h1><dl>{facts}</dl>",
        *(f"<p><em>{escape(note)}</em></p>" for note in notes),
        "<h2>Table</h2>",
        "<p>Means over pictures and seeds, of seconds the median. Click a heading to sort. "
        f"<b>identity</b> is the source, unchanged.{_explained(lines)}</p>",
        _table(lines),
    ]
    if curves:
        parts.append("<h2>Curves</h2>")
        parts += [_figure(curve.png, "png", curve.caption) for curve in curves]
    if grids:
        parts.append("<h2>Pictures</h2><p>Click one to see it at full size.</p>")
    for place, picture in enumerate(dict.fromkeys(picture for picture, _, _ in grids)):
        shown = [_figure(jpeg, "jpeg", name, False) for of, name, jpeg in grids if of == picture]
        is_open = " open" if place == 0 else ""
        parts.append(
            f"<details{is_open}><summary>{escape(picture)}</summary>{''.join(shown)}</details>"
        )
    parts.append(f"<script>{SCRIPT}</script></body></html>\n")
    return "\n".join(parts)


def _explained(lines: Sequence[Line]) -> str:
    columns = columns_of(lines)
    parts = [
        f"{METRICS[name].label}: {METRICS[name].about}." for name in columns if name in METRICS
    ]
    parts.append("A scale that a scheme does not use is empty.")
    parts += [text for name, text in EXPLAINED.items() if name in columns]
    return escape("".join(f" {part}" for part in parts))


def _table(lines: Sequence[Line]) -> str:
    columns = columns_of(lines)
    heads = "".join(f"<th>{escape(COLUMNS[name][0])}</th>" for name in columns)
    rows = []
    for line in lines:
        cells = line.cells()
        kind = ' class="identity"' if line.settings is None else ""
        rows.append(f"<tr{kind}>" + "".join(_cell(name, cells[name]) for name in columns) + "</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(name: str, value: object) -> str:
    kind = ' class="number"' if isinstance(value, (int, float)) else ""
    raw = "" if value is None else "Infinity" if value == math.inf else str(value)
    return f'<td{kind} data-value="{escape(raw)}">{escape(shown_value(name, value))}</td>'


def _figure(content: bytes, kind: str, caption: str, show: bool = True) -> str:
    data = base64.b64encode(content).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if show else ""
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(caption)}">'
        f"{below}</figure>"
    )
