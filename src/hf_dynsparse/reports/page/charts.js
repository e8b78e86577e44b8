"use strict";

// Elements and line charts. Texts become text nodes, never HTML.

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const html = (tag, attributes = {}, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const colour = (run) => `var(--run-${run % 7})`;
const dashes = (run) => ["none", "6 3", "2 3", "8 3 2 3"][Math.floor(run / 7) % 4];
const stroke = (run) => `stroke:${colour(run)};stroke-dasharray:${dashes(run)}`;

// Steps between ticks that people read: 1, 2, 5 and their tens; of a time halves and quarters of an hour.
const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

function tickStep(span, count, isTime) {
  const least = span / count;
  if (isTime && least > 0.5 && least <= 86400) return TIMES.find((step) => step >= least);
  const ten = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((factor) => factor * ten).find((step) => step >= least * (1 - 1e-9));
}

function ticks(from, to, count, isTime = false) {
  const step = tickStep(to - from || 1, count, isTime);
  const first = Math.ceil(from / step - 1e-9), last = Math.floor(to / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, place) => (first + place) * step);
}

const round = (value, digits = 4) => Number(value.toPrecision(digits)).toString();

function large(value) {
  if (value >= 1e12) return value.toExponential(2).replace(/\.?0*e\+/, "e");
  const [letter, scale] = [[" G", 1e9], [" M", 1e6], [" K", 1e3]].find(([, scale]) => value >= scale) || ["", 1];
  return round(value / scale) + letter;
}

function duration(seconds) {
  if (seconds < 120) return `${round(seconds, 3)} s`;
  if (seconds < 7200) return `${round(seconds / 60, 3)} min`;
  return seconds < 172800 ? `${round(seconds / 3600, 3)} h` : `${round(seconds / 86400, 3)} d`;
}

// What a chart may be drawn against, by column of a point: step, tokens, seconds, FLOPs, value.
const AXES = {
  step: { column: 0, label: "step", text: (value) => Math.round(value).toLocaleString("en") },
  tokens: { column: 1, label: "tokens", text: large },
  seconds: { column: 2, label: "training time", text: duration, isTime: true },
  flops: { column: 3, label: "training FLOPs", text: large },
};
const VALUE = 4;
const SHARES = /^dynsparse\/(coverage|newborn_share|pruning_ratio|sparsity)$/;

// One chart of curves {key, label, name, run, points}, with an axis from 0 to `most` and a line at `plateau` if given.
function drawChart(figure, title, curves, axis, most, plateau) {
  const size = { width: Math.max(260, figure.clientWidth), height: figure.matches(":first-child") ? 320 : 230 };
  const left = 54, right = size.width - 14, top = 10, bottom = size.height - 26;
  const along = (point) => point[axis.column];
  const known = curves.map((curve) => ({ ...curve, points: curve.points.filter((point) => along(point) !== null) }));
  const isShare = SHARES.test(curves[0].key);
  const text = (value) => {
    if (isShare) return `${round(100 * value, 3)}\u00a0%`;
    return Math.abs(value) >= 1e4 ? large(value) : round(value);
  };

  const values = known.flatMap((curve) => curve.points.map((point) => point[VALUE]));
  if (isShare || curves[0].key === "learning_rate") values.push(0);
  if (plateau !== undefined) values.push(0, plateau);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = 0.04 * (high - low || Math.abs(high) || 1);
  [low, high] = [low === 0 ? 0 : low - pad, high + pad];
  const x = (value) => left + (value / most) * (right - left);
  const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);

  const label = `${title} against ${axis.label}`;
  const box = `0 0 ${size.width} ${size.height}`;
  const picture = svg("svg", { viewBox: box, height: size.height, role: "img", "aria-label": label });
  const line = (kind, value) => svg("line", { class: kind, x1: left, x2: right, y1: y(value), y2: y(value) });
  const print = (text, x, y, anchor) => picture.append(svg("text", { x, y, "text-anchor": anchor }, text));
  for (const value of ticks(low, high, size.height / 55)) {
    picture.append(line("grid", value));
    print(text(value), left - 6, y(value) + 4, "end");
  }
  for (const value of ticks(0, most, Math.max(2, size.width / 80), axis.isTime)) {
    const [place, anchor] = x(value) > right - 16 ? [size.width - 2, "end"] : [x(value), "middle"];
    print(axis.text(value), place, size.height - 8, anchor);
  }
  if (plateau !== undefined) {
    picture.append(line("plateau", plateau));
    print("plateau of word frequencies", right, y(plateau) - 4, "end");
  }
  for (const { key, run, points } of known) {
    const places = points.map((point) => [x(along(point)).toFixed(1), y(point[VALUE]).toFixed(1)]);
    const look = key === "loss" && curves.length > 1 ? { "stroke-width": 1, opacity: 0.6 } : { "stroke-width": 2 };
    // Not on to a second evaluation at the same step: that is of other rows, all that were held out.
    const steps = places.map((place, at) => `${at && place[0] !== places[at - 1][0] ? "L" : "M"}${place}`);
    picture.append(svg("path", { d: steps.join(""), style: stroke(run), ...look }));
    if (key.startsWith("eval_"))
      picture.append(...places.map(([cx, cy]) => svg("circle", { cx, cy, r: 3, style: `fill:${colour(run)}` })));
  }
  figure.replaceChildren(html("h3", {}, title), picture, readout(picture, known));

  // The numbers of all curves where the pointer is.
  function readout(picture, known) {
    const caption = html("figcaption");
    const cursor = svg("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
    picture.append(cursor);
    const drawn = known.filter((curve) => curve.points.length);
    const several = new Set(drawn.map((curve) => curve.run)).size > 1;
    picture.addEventListener("pointermove", (event) => {
      const { left: edge, width } = picture.getBoundingClientRect();
      const at = ((((event.clientX - edge) * size.width) / width - left) / (right - left)) * most;
      const nearer = (one, other) => (Math.abs(along(other) - at) < Math.abs(along(one) - at) ? other : one);
      const nearest = drawn.map((curve) => curve.points.reduce(nearer));
      if (!nearest.length) return;
      const place = along(nearest.reduce(nearer));
      put(cursor, { x1: x(place), x2: x(place), visibility: "visible" }, []);
      const told = drawn.map(({ name, label }, each) => {
        return `${several ? `${name}, ` : ""}${label} ${text(nearest[each][VALUE])}`;
      });
      caption.textContent = `${axis.text(place)}: ${told.join("; ")}`;
    });
    picture.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      caption.textContent = "";
    });
    return caption;
  }
}
