const { runs, plateau, reload, made } = JSON.parse(document.getElementById("data").textContent);
const find = (selector) => document.querySelector(selector);
const several = runs.length > 1;
const broken = (name) => name.split(/(?<=[_/.])/).flatMap((part) => [part, html("wbr")]); // where a long name may break

// What is chosen stands in the address, and so survives a reload: #axis=tokens&layer=...&frame=3
const state = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
function choose(changes) {
  Object.assign(state, changes);
  for (const name of Object.keys(state)) if (state[name] === undefined) delete state[name];
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
}

const swatch = (run) =>
  svg("svg", { width: 28, height: 10, "aria-hidden": "true" },
    svg("path", { d: "M0 5H28", "stroke-width": 3, style: `stroke:var(--run-${run % 7});stroke-dasharray:${dashes(run)}` }));

function showHeader() {
  find("#title").append(...(several ? [`${runs.length} runs`] : broken(runs[0].name)));
  find("#made").textContent = `Written ${made}` + (reload ? `; loads itself again every ${reload} s while training goes on` : "");
  if (several) find("#runs").append(...runs.map((run, place) => html("li", {}, swatch(place), html("span", {}, ...broken(run.name)))));
}

// A row for each label that a run has a text for, and a column for each run. What is not known is no difference.
function compare(table, rowsOf) {
  const tables = runs.map((run) => new Map(rowsOf(run)));
  const labels = [...new Set(tables.flatMap((rows) => [...rows.keys()]))];
  const rows = labels.map((label) => [label, ...tables.map((rows) => rows.get(label) || "")]).filter(([, ...cells]) => cells.some(Boolean));
  const body = rows.map(([label, ...cells]) => {
    const differs = new Set(cells.filter(Boolean)).size > 1;
    return html("tr", differs ? { class: "differs" } : {}, html("th", { scope: "row" }, label), ...cells.map((cell) => html("td", {}, cell || "–")));
  });
  if (several) table.append(html("thead", {}, html("tr", {}, html("td", {}), ...runs.map((run) => html("th", { scope: "col" }, ...broken(run.name))))));
  table.append(html("tbody", {}, ...body));
  return rows.length;
}

// Charts: losses together, everything else by itself. What never changes in any run is no picture.
const curves = runs.flatMap((run, place) => run.curves.map((curve) => ({ ...curve, run: place, name: run.name })));
const varies = (key) => curves.some((curve) => curve.key === key && new Set(curve.points.map((point) => point[VALUE])).size > 1);
function chartsToDraw() {
  const keys = [...new Set(curves.map((curve) => curve.key))];
  const isLoss = (key) => key === "loss" || key === "eval_loss";
  const order = (key) => ["eval_context_gain", "learning_rate", "dynsparse/coverage", "dynsparse/newborn_share"].indexOf(key) + 1 || 9;
  const alone = keys.filter((key) => !isLoss(key) && (key.startsWith("eval_") || varies(key))).sort((one, other) => order(one) - order(other));
  const groups = alone.map((key) => curves.filter((curve) => curve.key === key));
  if (keys.some(isLoss)) groups.unshift(curves.filter((curve) => isLoss(curve.key)));
  return groups;
}

function showCurves() {
  const groups = chartsToDraw();
  const known = Object.keys(AXES).filter((name) => curves.some((curve) => curve.points.some((point) => point[AXES[name].column] !== null)));
  if (!known.length) return void find("#curves").replaceChildren(find("#curves h2"), html("p", { class: "note" }, "Nothing is logged yet: a checkpoint brings the log along."));
  if (!known.includes(state.axis)) state.axis = known.includes("tokens") ? "tokens" : known[0];
  const figures = groups.map(() => html("figure"));
  find(".charts").append(...figures);
  const lengthOf = (axis) => Math.max(...curves.flatMap((curve) => curve.points.map((point) => point[AXES[axis].column])));
  const draw = () => groups.forEach((group, place) => {
    const isLoss = group.some((curve) => /^(eval_)?loss$/.test(curve.key));
    const gain = group[0].key === "eval_context_gain" ? plateau : undefined;
    drawChart(figures[place], isLoss ? "loss" : group[0].label + (gain ? " (nats)" : ""), group, state.axis, lengthOf(state.axis), gain);
  });
  for (const name of known) {
    const radio = html("input", { type: "radio", name: "axis", value: name, ...(name === state.axis ? { checked: "" } : {}) });
    radio.addEventListener("change", () => { choose({ axis: name }); draw(); });
    find("#curves fieldset").append(html("label", {}, radio, ` ${AXES[name].label}`));
  }
  let width = 0;
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (width === (width = find(".charts").clientWidth)) return; // the charts' own height
    draw();
  })).observe(find(".charts"));
}

// Block maps. All frames of a layer: one Uint8Array of packed bits each.
const unpacked = new Map();
async function framesOf(map) {
  if (!unpacked.has(map)) {
    const zipped = Uint8Array.from(atob(map.bits), (letter) => letter.charCodeAt(0));
    const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
    const bits = new Uint8Array(await new Response(stream).arrayBuffer());
    const size = bits.length / map.steps.length;
    for (let place = size; place < bits.length; place++) bits[place] ^= bits[place - size]; // a frame holds what has changed
    unpacked.set(map, map.steps.map((_, place) => bits.subarray(place * size, (place + 1) * size)));
  }
  return unpacked.get(map);
}

const KINDS = [["never", "never active"], ["before", "active before"], ["active", "active"], ["newborn", "new since the frame before"]];

async function drawMap(canvas, caption, map, step) {
  const frames = await framesOf(map);
  const place = Math.max(0, map.steps.findLastIndex((each) => each <= step));
  const [rows, columns] = map.grid;
  const style = getComputedStyle(document.documentElement);
  const colours = KINDS.map(([kind]) => style.getPropertyValue(`--${kind}`).trim()).map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));
  const context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [columns, rows];
  const picture = context.createImageData(columns, rows);
  const isSet = (frame, block) => (frame[block >> 3] >> (7 - (block & 7))) & 1;
  const counts = [0, 0, 0, 0];
  for (let block = 0; block < rows * columns; block++) {
    let kind = 0;
    if (isSet(frames[place], block)) kind = place && !isSet(frames[place - 1], block) ? 3 : 2;
    else for (let earlier = 0; earlier < place && !kind; earlier++) kind = isSet(frames[earlier], block);
    counts[kind]++;
    picture.data.set([...colours[kind], 255], 4 * block);
  }
  context.putImageData(picture, 0, 0);
  const share = (count) => `${round((100 * count) / (rows * columns))}\u00a0%`;
  const update = map.updates[place] < 0 ? "" : `, update ${map.updates[place]}`;
  const left = map.left_out ? `; ${map.left_out} frames are left out, for size` : "";
  caption.textContent = `step ${map.steps[place].toLocaleString("en")}${update}: ${rows} x ${columns} blocks, ${share(counts[2] + counts[3])} active, ${counts[3]} new, ${share(counts[1] + counts[2] + counts[3])} active at some time${left}`;
  canvas.setAttribute("aria-label", caption.textContent);
}

function showMaps() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.maps)))];
  const missing = runs.filter((run) => run.maps_left_out.length);
  find("#left-out").textContent = missing.map((run) => `${run.name}: no room for the maps of ${run.maps_left_out.length} layers.`).join(" ");
  if (!names.length) return void find("#map").remove();
  const [select, slider, play, when] = ["#layer", "#frame", "#play", "#when"].map(find);
  const length = (name) => Math.max(...runs.map((run) => run.maps[name]?.steps.length || 0));
  if (!names.includes(state.layer)) state.layer = names.reduce((best, name) => (length(name) > length(best) ? name : best));
  select.append(...names.map((name) => html("option", name === state.layer ? { selected: "" } : {}, name)));
  find("#kinds").append(...KINDS.map(([kind, label]) => html("li", {}, html("i", { style: `background:var(--${kind})` }), label)));
  let steps = [], panels = [];

  function chooseLayer() {
    const shown = runs.map((run, place) => ({ place, name: run.name, map: run.maps[state.layer] })).filter((run) => run.map);
    steps = [...new Set(shown.flatMap((run) => run.map.steps))].sort((one, other) => one - other);
    panels = shown.map((run) => ({ ...run, canvas: html("canvas", { role: "img" }), caption: html("figcaption") }));
    find(".maps").replaceChildren(...panels.map(({ place, name, map, canvas, caption }) => {
      const zoom = Math.max(1, Math.floor(480 / Math.max(...map.grid)));
      canvas.style.width = `${zoom * map.grid[1]}px`;
      const figure = html("figure", {}, ...(several ? [html("h3", {}, swatch(place), " ", ...broken(name))] : []), canvas, caption);
      figure.style.maxWidth = `min(100%, ${Math.max(280, zoom * map.grid[1])}px)`;
      return figure;
    }));
    slider.max = steps.length - 1;
    slider.disabled = play.disabled = steps.length < 2;
    slider.value = state.frame ?? steps.length - 1; // the latest, unless another is chosen
    return draw();
  }
  async function draw() {
    const step = steps[slider.value];
    when.textContent = step.toLocaleString("en");
    slider.setAttribute("aria-valuetext", `step ${step}`);
    await Promise.all(panels.map(({ canvas, caption, map }) => drawMap(canvas, caption, map, step)));
  }
  const move = (place) => {
    slider.value = place;
    choose({ frame: Number(place) === steps.length - 1 ? undefined : place });
    return draw();
  };
  let timer = 0;
  function stop() {
    timer = clearInterval(timer);
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  }
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    if (Number(slider.value) === steps.length - 1) move(0);
    timer = setInterval(() => {
      move(Number(slider.value) + 1);
      if (Number(slider.value) === steps.length - 1) stop();
    }, Math.min(600, Math.max(60, 8000 / steps.length)));
  });
  slider.addEventListener("input", () => { stop(); move(slider.value); });
  select.addEventListener("change", () => { stop(); choose({ layer: select.value, frame: undefined }); chooseLayer(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return chooseLayer();
}

function showLayers() {
  const rows = new Map();
  runs.forEach((run, place) => run.layers.forEach((layer) => rows.set(layer[0], [...(rows.get(layer[0]) || []), [place, ...layer.slice(1)]])));
  if (!rows.size) return void find("#layers").remove();
  const most = Math.max(...[...rows.values()].flat().map((cells) => cells[4]));
  const bar = ([place, , , , density]) =>
    html("div", { class: "bar" }, html("i", { style: `width:${(70 * density) / most}%;background:var(--run-${place % 7})` }), round(density, 4));
  const headings = ["layer", "density", "shape", "block", "nnzb"].map((text) => html("th", { scope: "col" }, text));
  const texts = (cells, place) => [...new Set(cells.map((each) => each[place]))].join(", ");
  find("#layers table").append(
    html("thead", {}, html("tr", {}, ...headings)),
    html("tbody", {}, ...[...rows].map(([name, cells]) =>
      html("tr", {}, html("th", { scope: "row" }, ...broken(name)), html("td", {}, ...cells.map(bar)), ...[1, 2, 3].map((place) => html("td", {}, texts(cells, place)))))));
}

function showTables(selector, rowsOf, noteOf = () => "") {
  for (const run of runs) {
    const [headings, ...rows] = rowsOf(run);
    if (noteOf(run)) find(selector).append(html("p", { class: "note" }, (several ? `${run.name}: ` : "") + noteOf(run)));
    if (!rows.length) continue;
    find(selector).append(html("div", { class: "wide" }, html("table", {},
      ...(several ? [html("caption", {}, ...broken(run.name))] : []),
      html("thead", {}, html("tr", {}, ...headings.map((text) => html("th", { scope: "col" }, text)))),
      html("tbody", {}, ...rows.map((cells) => html("tr", {}, ...cells.map((cell) => html("td", {}, cell))))))));
  }
  if (find(selector).children.length === 1) find(selector).remove();
}

showHeader();
compare(find("#summary table"), (run) => run.summary);
if (!compare(find("#settings"), (run) => run.settings)) find("#summary details").remove();
showCurves();
showLayers();
showTables("#kernels", (run) => run.kernels);
showTables("#masks", (run) => run.masks, (run) => run.masks_note);
window.addEventListener("hashchange", () => location.reload());
if (reload) setTimeout(() => location.reload(), 1000 * reload);
Promise.resolve(showMaps()).then(() => document.body.setAttribute("data-drawn", ""));
