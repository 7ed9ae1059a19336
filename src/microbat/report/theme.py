"""The page's looks and its few lines of script; constants only, so that the page needs no other file."""

CSS = """
:root { --ink: #22303c; --quiet: #5b6875; --line: #dfe4e9; --wash: #f5f7f9; --accent: #3366a8; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: white; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .3rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; overflow-wrap: anywhere; }
p { margin: .3rem 0 .9rem; max-width: 46rem; }
.under, .how, footer { color: var(--quiet); }
.verdict { font-size: 1.15rem; line-height: 1.5; border-left: 4px solid var(--accent); background: var(--wash);
  padding: .8rem 1rem; margin: 1.2rem 0 1.4rem; max-width: none; border-radius: 0 6px 6px 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.8rem, 1fr)); gap: .7rem;
  margin: 0 0 1rem; padding: 0; }
.facts div { border: 1px solid var(--line); border-radius: 6px; padding: .55rem .8rem; }
.facts dt { color: var(--quiet); font-size: .82rem; }
.facts dd { margin: 0; font-size: 1.12rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.facts small { display: block; color: var(--quiet); font-weight: 400; font-size: .8rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; }
.tall { max-height: 34rem; overflow-y: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; padding: .38rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; }
td.n, th.n { text-align: right; }
tr.chosen td { font-weight: 650; background: #eef3fa; }
.tall table { font-size: .86rem; } .tall td, .tall th { padding: .34rem .55rem; }
.dense th, .dense td { font-size: .84rem; padding: .34rem .45rem; }
.tall thead th { position: sticky; top: 0; background: var(--wash); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
details.step { border: 0; border-left: 2px solid var(--line); border-radius: 0; margin: .3rem 0; padding: .1rem .8rem; }
table.pairs th { width: 13rem; }
details td { white-space: normal; overflow-wrap: anywhere; }
.case { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; padding: .8rem; border: 1px solid var(--line);
  border-radius: 6px; }
.case img { width: 14rem; max-width: 100%; height: auto; align-self: flex-start; border: 1px solid var(--line);
  image-rendering: pixelated; }
.case figcaption { flex: 1 1 22rem; min-width: 0; } .case p { margin: 0 0 .4rem; }
.case td { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
.case td:first-child { min-width: 10rem; overflow-wrap: normal; } .case td:last-child { width: 100%; }
.case td.right { color: #27723b; font-weight: 700; } .case td.wrong { color: #a33; font-weight: 700; }
.figure { width: 100%; overflow: hidden; }
.figure .failure { color: #a33; padding: 1rem; border: 1px dashed #d99; border-radius: 6px; }
.tools { display: flex; flex-wrap: wrap; gap: .5rem 1rem; margin: .5rem 0; font-size: .92rem; }
select, input { font: inherit; color: inherit; padding: .15rem .4rem; border: 1px solid #c6cdd4; border-radius: 5px;
  background: white; max-width: 100%; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: .88rem; }
@media (max-width: 640px) {
  main { padding: 1.2rem .8rem 3rem; } h1 { font-size: 1.4rem; } .verdict { font-size: 1.05rem; }
  th, td { padding: .38rem .45rem; }
}
@media print { .tools, nav { display: none; } .tall { max-height: none; } }
"""

# Figures are drawn one after the other, as the page fills. The root element says how far that is: data-figures
# (drawn), data-state ("drawing", "done"), data-errors. A figure that fails shows its message in its place.
SCRIPT = """
(function () {
  const root = document.documentElement;
  const failed = message => {
    root.dataset.errors = (root.dataset.errors ? root.dataset.errors + " | " : "") + message;
  };
  addEventListener("error", event => failed(event.message));
  addEventListener("unhandledrejection", event => failed(String(event.reason)));

  // On a phone two surfaces stand one above the other.
  function stack(layout) {
    layout.scene.domain = { x: [0, 1], y: [0.52, 0.97] };
    layout.scene2.domain = { x: [0, 1], y: [0, 0.45] };
    layout.annotations.forEach((note, i) => { note.x = 0.5; note.y = i ? 0.46 : 0.98; });
    for (const scene of [layout.scene, layout.scene2])
      for (const axis of "xyz") scene.camera.eye[axis] *= 1.2;
    layout.height *= 1.55;
    layout.updatemenus.forEach(menu => { menu.y = 1.05; });
  }

  async function draw(div) {
    try {
      const figure = JSON.parse(document.getElementById(div.id + "-data").textContent);
      if (figure.layout.scene2 && div.clientWidth < 640) stack(figure.layout);
      await Plotly.newPlot(div, figure.data, figure.layout, { responsive: true, displayModeBar: false });
      root.dataset.figures = Number(root.dataset.figures || 0) + 1;
    } catch (error) {
      failed(div.id + ": " + error.message);
      const note = document.createElement("p");
      note.className = "failure";
      note.textContent = "This figure could not be drawn: " + error.message;
      div.replaceChildren(note);
    }
  }

  async function drawOpen() {
    root.dataset.state = "drawing";
    for (const div of document.querySelectorAll(".figure")) {
      const fold = div.closest("details");
      if (!fold || fold.open) await draw(div);
    }
    root.dataset.state = "done";
  }

  // Browsers keep only some 16 WebGL views alive: a folded figure is drawn when it opens and let go when it closes.
  document.querySelectorAll("details.lazy").forEach(fold => fold.addEventListener("toggle", async () => {
    for (const div of fold.querySelectorAll(".figure")) fold.open ? await draw(div) : Plotly.purge(div);
  }));

  document.querySelectorAll("select[data-highlights]").forEach(select => select.addEventListener("change", () => {
    const div = document.getElementById(select.dataset.highlights);
    const chosen = select.value;
    const all = div.data.map((_, i) => i);
    Plotly.restyle(div, {
      opacity: all.map(i => chosen === "" || String(i) === chosen ? 1 : 0.1),
      "line.width": all.map(i => String(i) === chosen ? 3 : 1.6),
    });
  }));

  document.querySelectorAll("table.sortable").forEach(table => {
    const body = table.tBodies[0];
    const cell = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent;
    table.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
      const head = button.closest("th"), column = head.cellIndex, numeric = head.classList.contains("n");
      const down = head.getAttribute("aria-sort") === "ascending" || (numeric && !head.hasAttribute("aria-sort"));
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...[...body.rows].sort((one, two) => {
        const a = cell(one, column), b = cell(two, column);
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
        return down ? -order : order;
      }));
    }));
  });

  document.querySelectorAll("input[data-filters]").forEach(input => input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of document.getElementById(input.dataset.filters).tBodies[0].rows)
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
  }));

  drawOpen();
})();
"""
