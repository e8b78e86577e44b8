// What is on the page, section by section.

const { runs, plateau, reload, made } = JSON.parse(document.getElementById("data").textContent);
const find = (selector) => document.querySelector(selector);
const several = runs.length > 1;
const broken = (name) => name.split(/(?<=[_/.])/).flatMap((part) => [part, html("wbr")]); // where names may break
const row = (...cells) => html("tr", {}, ...cells);
const heading = (scope, ...text) => html("th", { scope }, ...text);
const cell = (...content) => html("td", {}, ...content);
const note = (text) => html("p", { class: "note" }, text);
const swatch = (run) =>
  svg("svg", { width: 28, height: 10, "aria-hidden": "true" },
    svg("path", { d: "M0 5H28", "stroke-width": 3, style: stroke(run) }));

// What is chosen stands in the address, and so survives a reload: #axis=tokens&layer=...&frame=3
const state = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
function choose(changes) {
  Object.assign(state, changes);
  for (const name of Object.keys(state)) if (state[name] === undefined) delete state[name];
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
}

function showHeader() {
  find("#title").append(...(several ? [`${runs.length} runs`] : broken(runs[0].name)));
  const again = reload ? `; loads itself again every ${reload} s while training goes on` : "";
  find("#made").textContent = `Written ${made}${again}`;
  const entry = (run, place) => html("li", {}, swatch(place), html("span", {}, ...broken(run.name)));
  if (several) find("#runs").append(...runs.map(entry));
}

// A row for each label that a run has a text for, and a column for each run. What is not known is no difference.
function compare(table, rowsOf) {
  const columns = runs.map((run) => new Map(rowsOf(run)));
  const labels = [...new Set(columns.flatMap((column) => [...column.keys()]))];
  const body = html("tbody");
  for (const label of labels) {
    const texts = columns.map((column) => column.get(label) || "");
    if (!texts.some(Boolean)) continue;
    body.append(row(heading("row", label), ...texts.map((text) => cell(text || "–"))));
    if (new Set(texts.filter(Boolean)).size > 1) body.lastChild.className = "differs";
  }
  if (several) table.append(html("thead", {}, row(cell(), ...runs.map((run) => heading("col", ...broken(run.name))))));
  table.append(body);
  return body.children.length;
}

// Losses come together, everything else by itself. What never changes in any run is no picture.
function chartsOf(curves) {
  const first = ["eval_context_gain", "learning_rate", "dynsparse/coverage", "dynsparse/newborn_share"];
  const byKey = Map.groupBy(curves, (curve) => curve.key);
  const isLoss = (key) => key === "loss" || key === "eval_loss";
  const varies = (group) => group.some(({ points }) => points.some((point) => point[VALUE] !== points[0][VALUE]));
  const isDrawn = (key) => !isLoss(key) && (key.startsWith("eval_") || varies(byKey.get(key)));
  const keys = [...new Set([...first.filter((key) => byKey.has(key)), ...byKey.keys()])].filter(isDrawn);
  const losses = curves.filter((curve) => isLoss(curve.key));
  const groups = keys.map((key) => [byKey.get(key)[0].label, byKey.get(key)]);
  return losses.length ? [["loss", losses], ...groups] : groups;
}

function showCurves() {
  const curves = runs.flatMap((run, place) => run.curves.map((curve) => ({ ...curve, run: place, name: run.name })));
  const points = curves.flatMap((curve) => curve.points);
  const costs = (axis) => points.map((point) => point[AXES[axis].column]).filter(Boolean);
  const known = Object.keys(AXES).filter((axis) => costs(axis).length);
  if (!known.length) {
    const missing = note("Nothing is logged yet: a checkpoint brings the log along.");
    return find("#curves").replaceChildren(find("#curves h2"), missing);
  }
  if (!known.includes(state.axis)) state.axis = known.includes("tokens") ? "tokens" : known[0];
  const charts = chartsOf(curves).map(([title, group]) => ({ title, group, figure: html("figure") }));
  find(".charts").append(...charts.map(({ figure }) => figure));
  function draw() {
    const most = Math.max(...costs(state.axis));
    for (const { title, group, figure } of charts) {
      const line = group[0].key === "eval_context_gain" ? plateau : undefined;
      drawChart(figure, title + (line ? " (nats)" : ""), group, AXES[state.axis], most, line);
    }
  }
  for (const axis of known) {
    const radio = html("input", { type: "radio", name: "axis", ...(axis === state.axis ? { checked: "" } : {}) });
    radio.addEventListener("change", () => {
      choose({ axis });
      draw();
    });
    find("#curves fieldset").append(html("label", {}, radio, ` ${AXES[axis].label}`));
  }
  let width = 0; // a drawing changes the height, which is no reason for another
  const redraw = () => width !== (width = find(".charts").clientWidth) && draw();
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(find(".charts"));
}

function showLayers() {
  const layers = runs.flatMap((run, place) => run.layers.map(([name, ...sizes]) => ({ name, sizes, place })));
  if (!layers.length) return find("#layers").remove();
  const most = Math.max(...layers.map(({ sizes }) => sizes[3]));
  const bar = ({ sizes, place }) => {
    const style = `width:${(70 * sizes[3]) / most}%;background:${colour(place)}`;
    return html("div", { class: "bar" }, html("i", { style }), round(sizes[3]));
  };
  const body = [...Map.groupBy(layers, ({ name }) => name)].map(([name, alike]) => {
    const texts = [0, 1, 2].map((place) => cell([...new Set(alike.map(({ sizes }) => sizes[place]))].join(", ")));
    return row(heading("row", ...broken(name)), cell(...alike.map(bar)), ...texts);
  });
  const headings = ["layer", "density", "shape", "block", "nnzb"].map((text) => heading("col", text));
  find("#layers table").append(html("thead", {}, row(...headings)), html("tbody", {}, ...body));
}

// A table of its own for each run that has one.
function showTables(section, rowsOf, noteOf = () => "") {
  for (const run of runs) {
    if (noteOf(run)) section.append(note((several ? `${run.name}: ` : "") + noteOf(run)));
    const [headings, ...rows] = rowsOf(run);
    if (!headings) continue;
    const table = html("table", {}, ...(several ? [html("caption", {}, ...broken(run.name))] : []));
    table.append(html("thead", {}, row(...headings.map((text) => heading("col", text)))));
    table.append(html("tbody", {}, ...rows.map((texts) => row(...texts.map((text) => cell(text))))));
    section.append(html("div", { class: "wide" }, table));
  }
  if (section.children.length === 1) section.remove(); // a heading alone
}

showHeader();
compare(find("#summary table"), (run) => run.summary);
if (!compare(find("#settings"), (run) => run.settings)) find("#summary details").remove();
showCurves();
showMaps();
showLayers();
showTables(find("#kernels"), (run) => run.kernels);
showTables(find("#masks"), (run) => run.masks, (run) => run.masks_note);
addEventListener("hashchange", () => location.reload());
if (reload) setTimeout(() => location.reload(), 1000 * reload);
