"""Style, script and picture viewer of the report's page (layer 4)."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
       max-width: 1900px; padding: 1rem 2rem 4rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 0; } h4 { margin: .8rem 0 .3rem; font-weight: 600; }
p, ul { margin: .3rem 0; max-width: 75em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; } summary h2 { display: inline; }
.table { margin-top: 2rem; } .scroll { overflow: auto; max-height: 80vh; }
table { border-collapse: collapse; font-size: 13px; }
th { position: sticky; top: 0; background: #f3f3f3; text-align: left; vertical-align: bottom;
     min-width: 4.5em; }
th button { font: inherit; border: 0; background: none; padding: 0; text-align: left;
            cursor: pointer; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td small { color: #666; } td.better { background: #e3f4e3; } td.worse { background: #fbe4e1; }
tr.marked { background: #fff8dc; }
th.up button::after { content: " \\25b2"; } th.down button::after { content: " \\25bc"; }
figure { margin: 1rem 0 2rem; overflow-x: auto; } figcaption { color: #444; max-width: 70em; }
figure img { max-width: 100%; height: auto; cursor: zoom-in; }
figure img.full { max-width: none; cursor: zoom-out; }
.tiles { display: grid; gap: 10px;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.tile { font: 13px/1.35 system-ui, sans-serif; color: inherit; border: 0; padding: 0; margin: 0;
        background: none; text-align: left; display: flex; flex-direction: column; gap: .2rem; }
button.tile { cursor: zoom-in; } .tile img { width: 100%; height: auto; }
.tile span { overflow-wrap: anywhere; } .none { background: #ddd; padding: 4rem 0;
        text-align: center; }
#viewer { width: 98vw; height: 97vh; max-width: none; max-height: none; padding: .5rem .8rem;
          box-sizing: border-box; border: 0; }
#viewer[open] { display: flex; flex-direction: column; gap: .4rem; }
#viewer form { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; }
#viewer select { max-width: 30em; }
#stage { flex: 1; min-height: 0; overflow: auto; background: #444; display: flex; }
#pair { position: relative; margin: auto; flex: none; cursor: ew-resize; touch-action: pan-y; }
#pair img { position: absolute; width: 100%; height: 100%; user-select: none; }
#pair.sharp img { image-rendering: pixelated; }
#over { clip-path: inset(0 calc(100% - var(--at)) 0 0); }
#bar { position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px;
       background: #fff; box-shadow: 0 0 2px #000; }
#slide { width: 100%; margin: 0; }
:focus-visible { outline: 3px solid #1a73e8; outline-offset: 1px; }
@media print {
  .scroll { max-height: none; overflow: visible; } th { position: static; }
  .controls, select, dialog { display: none; } figure, .tile, tr { break-inside: avoid; }
  h2, h3, h4, .case p { break-after: avoid; } thead { display: table-row-group; }
}
"""

VIEWER = """
<dialog id="viewer" aria-label="two pictures under a slider"><form method="dialog">
<b id="name"></b>
<label>left <select id="left"></select></label>
<button type="button" id="swap">swap</button>
<label>right <select id="right"></select></label>
<label>zoom <select id="zoom"><option value="0">fit</option><option>1</option><option>2</option>
<option>4</option><option>8</option></select></label>
<span>arrow keys move the slider, Escape closes</span><button>close</button></form>
<div id="stage"><div id="pair"><img id="under" alt="right" draggable="false">
<img id="over" alt="left" draggable="false"><div id="bar"></div></div></div>
<input type="range" id="slide" min="0" max="100" step="0.5" value="50"
 aria-label="where the left picture ends"></dialog>
"""

# A click on a heading sorts by its column, numbers as numbers, empty cells last; on a figure, shows
# it at full size; on a tile, opens the viewer with the source, or for that the target, beside it.
# Tables of several tasks can be narrowed to one.
SCRIPT = """
const $ = (id) => document.getElementById(id);
for (const image of document.querySelectorAll("[data-same]"))
  image.src = $(image.dataset.same).src;
for (const image of document.querySelectorAll("figure img"))
  image.addEventListener("click", () => image.classList.toggle("full"));
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => head.addEventListener("click", () => {
    const up = !head.classList.contains("up");
    for (const other of heads) other.className = "";
    head.className = up ? "up" : "down";
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [a, b].map((row) => row.cells[index].dataset.value);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
}
for (const table of document.querySelectorAll("table")) {
  const rows = [...table.tBodies[0].rows];
  const tasks = [...new Set(rows.map((row) => row.cells[0].dataset.value))];
  if (table.tHead.rows[0].cells[0].textContent !== "task" || tasks.length < 2) continue;
  const choice = document.createElement("select");
  choice.setAttribute("aria-label", "task");
  choice.append(new Option("every task", ""), ...tasks.map((task) => new Option(task)));
  choice.addEventListener("change", () => {
    for (const row of rows)
      row.hidden = choice.value !== "" && row.cells[0].dataset.value !== choice.value;
  });
  table.closest(".scroll").before(choice);
}
const arrange = () => {  // as many columns as have room, and rows that are equally long
  for (const row of document.querySelectorAll(".tiles")) {
    const fit = Math.max(1, Math.floor((row.clientWidth + 10) / (+$("size").value + 10)));
    const columns = Math.ceil(row.children.length / Math.ceil(row.children.length / fit));
    row.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 640px))`;
  }
};
if ($("size")) {
  $("size").addEventListener("input", arrange);
  addEventListener("resize", arrange);
  arrange();
}
let tiles = new Map();
const show = () => {
  const [left, right] = [$("left"), $("right")].map((one) => tiles.get(one.value).firstChild);
  [$("over").src, $("under").src] = [left.src, right.src];
  const [width, height] = [right.naturalWidth, right.naturalHeight];
  const room = [$("stage").clientWidth / width, $("stage").clientHeight / height];
  const zoom = +$("zoom").value || Math.min(...room);
  $("pair").style.width = width * zoom + "px";
  $("pair").style.height = height * zoom + "px";
  $("pair").classList.toggle("sharp", zoom >= 2 && $("zoom").value !== "0");
};
const slide = () => $("pair").style.setProperty("--at", $("slide").value + "%");
const follow = (event) => {
  const box = $("pair").getBoundingClientRect();
  $("slide").value = 100 * (event.clientX - box.left) / box.width;
  slide();
};
$("pair").addEventListener("pointerdown", (event) => {
  $("pair").setPointerCapture(event.pointerId);
  follow(event);
});
$("pair").addEventListener("pointermove", (event) => { if (event.buttons) follow(event); });
$("slide").addEventListener("input", slide);
$("swap").addEventListener("click", () => {
  [$("left").value, $("right").value] = [$("right").value, $("left").value];
  show();
});
for (const id of ["left", "right", "zoom"]) $(id).addEventListener("change", show);
addEventListener("resize", () => { if ($("viewer").open) show(); });
for (const part of document.querySelectorAll(".case")) {
  const byLabel = new Map();
  for (const tile of part.querySelectorAll("button.tile"))
    if (!byLabel.has(tile.dataset.label)) byLabel.set(tile.dataset.label, tile);
  const labels = [...byLabel.keys()];
  part.addEventListener("click", (event) => {
    const tile = event.target.closest("button.tile");
    if (!tile) return;
    tiles = byLabel;
    $("name").textContent = part.dataset.name;
    for (const id of ["left", "right"])
      $(id).replaceChildren(...labels.map((label) => new Option(label)));
    const clicked = tile.dataset.label;
    $("left").value = labels[0];
    $("right").value = clicked !== labels[0] ? clicked : byLabel.has("target") ? "target"
      : labels[labels.length - 1];
    $("slide").value = 50;
    $("viewer").showModal();
    slide();
    show();
    $("slide").focus();
  });
}
"""
