// Block maps of the runs, one layer and one step at a time.

const KINDS = {
  never: "never active",
  before: "active before",
  active: "active",
  newborn: "new since the frame before",
};

// All frames of a layer, each of them packed bits.
const unpacked = new Map();
async function framesOf(map) {
  if (!unpacked.has(map)) {
    const zipped = Uint8Array.from(atob(map.bits), (letter) => letter.charCodeAt(0));
    const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
    const bits = new Uint8Array(await new Response(stream).arrayBuffer());
    const size = bits.length / map.steps.length;
    // A frame holds what has changed.
    for (let place = size; place < bits.length; place++) bits[place] ^= bits[place - size];
    unpacked.set(map, map.steps.map((_, place) => bits.subarray(place * size, (place + 1) * size)));
  }
  return unpacked.get(map);
}

async function drawMap({ map, canvas, caption }, step) {
  const frames = await framesOf(map);
  const place = Math.max(0, map.steps.findLastIndex((each) => each <= step));
  const [now, before] = [frames[place], frames[Math.max(0, place - 1)]]; // in the first frame no block is new
  const everActive = new Uint8Array(now.length);
  for (const frame of frames.slice(0, place + 1)) frame.forEach((bits, each) => (everActive[each] |= bits));

  const [rows, columns] = map.grid;
  Object.assign(canvas, { width: columns, height: rows });
  const picture = new ImageData(columns, rows);
  const pixels = new DataView(picture.data.buffer);
  const style = getComputedStyle(document.documentElement);
  const colourOf = (kind) => style.getPropertyValue(`--${kind}`).trim();
  const colours = Object.keys(KINDS).map((kind) => parseInt(`${colourOf(kind).slice(1)}ff`, 16)); // RGBA
  const isSet = (bits, block) => (bits[block >> 3] >> (7 - (block & 7))) & 1;
  const counts = [0, 0, 0, 0];
  for (let block = 0; block < rows * columns; block++) {
    const kind = isSet(now, block) ? 3 - isSet(before, block) : isSet(everActive, block);
    counts[kind]++;
    pixels.setUint32(4 * block, colours[kind]);
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);

  const [, past, old, newborn] = counts;
  const share = (count) => `${round((100 * count) / (rows * columns), 3)}\u00a0%`;
  const update = map.updates[place] < 0 ? "" : `, update ${map.updates[place]}`;
  caption.textContent =
    `step ${map.steps[place].toLocaleString("en")}${update}: ` +
    `${rows} x ${columns} blocks, ${share(old + newborn)} active, ${newborn} new, ` +
    `${share(past + old + newborn)} active at some time` +
    (map.left_out ? `; ${map.left_out} frames are left out, for size` : "");
  canvas.setAttribute("aria-label", caption.textContent);
}

function showMaps() {
  const missing = runs.filter((run) => run.maps_left_out.length);
  const notes = missing.map((run) => `${run.name}: no room for the maps of ${run.maps_left_out.length} layers.`);
  find("#left-out").textContent = notes.join(" ");
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.maps)))];
  if (!names.length) return find(missing.length ? ".controls" : "#map").remove();
  const count = (name) => Math.max(...runs.map((run) => run.maps[name]?.steps.length || 0));
  const longest = names.reduce((best, name) => (count(name) > count(best) ? name : best));
  if (!names.includes(state.layer)) state.layer = longest;
  const [select, slider, play, when] = ["#layer", "#frame", "#play", "#when"].map(find);
  select.append(...names.map((name) => html("option", name === state.layer ? { selected: "" } : {}, name)));
  const square = (kind) => html("i", { style: `background:var(--${kind})` });
  find("#kinds").append(...Object.entries(KINDS).map(([kind, label]) => html("li", {}, square(kind), label)));
  let steps, panels, timer;

  function chooseLayer() {
    const shown = runs
      .map((run, place) => ({ place, name: run.name, map: run.maps[state.layer] }))
      .filter(({ map }) => map);
    steps = [...new Set(shown.flatMap(({ map }) => map.steps))].sort((one, other) => one - other);
    panels = shown.map((run) => ({ ...run, canvas: html("canvas", { role: "img" }), caption: html("figcaption") }));
    find(".maps").replaceChildren(...panels.map(({ place, name, map, canvas, caption }) => {
      const width = map.grid[1] * Math.max(1, Math.floor(480 / Math.max(...map.grid)));
      canvas.style.width = `${width}px`;
      const heading = several ? [html("h3", {}, swatch(place), " ", ...broken(name))] : [];
      return html("figure", { style: `max-width:min(100%, ${Math.max(280, width)}px)` }, ...heading, canvas, caption);
    }));
    slider.max = steps.length - 1;
    slider.disabled = play.disabled = steps.length < 2;
    slider.value = state.frame ?? slider.max; // the latest, unless another is chosen
    draw();
  }
  function draw() {
    const step = steps[slider.value];
    when.textContent = step.toLocaleString("en");
    slider.setAttribute("aria-valuetext", `step ${step}`);
    panels.forEach((panel) => drawMap(panel, step).catch((error) => (panel.caption.textContent = String(error))));
  }
  function move(place) {
    slider.value = place;
    choose({ frame: slider.value === slider.max ? undefined : slider.value });
    draw();
  }
  function run(isRunning) {
    timer = clearInterval(timer);
    if (isRunning) timer = setInterval(advance, Math.min(600, Math.max(60, 8000 / steps.length)));
    play.textContent = isRunning ? "Pause" : "Play";
    play.setAttribute("aria-pressed", isRunning);
  }
  function advance() {
    move(slider.valueAsNumber + 1);
    if (slider.value === slider.max) run(false);
  }
  play.addEventListener("click", () => {
    if (!timer && slider.value === slider.max) move(0);
    run(!timer);
  });
  slider.addEventListener("input", () => {
    run(false);
    move(slider.value);
  });
  select.addEventListener("change", () => {
    run(false);
    choose({ layer: select.value, frame: undefined });
    chooseLayer();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  chooseLayer();
}
