"use strict";

// Elements and line charts. Texts become text nodes, never HTML.

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const html = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

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
  const found = [];
  for (let number = Math.ceil(from / step - 1e-9) + 0; number * step <= to + step * 1e-9; number++) found.push(number * step);
  return found;
}

const round = (value, digits = 3) => Number(value.toPrecision(digits)).toString();

function large(value) {
  if (value >= 1e12) return value.toExponential(2).replace(/\.?0+e\+?/, "e");
  for (const [letter, scale] of [["G", 1e9], ["M", 1e6], ["K", 1e3]])
    if (value >= scale) return `${round(value / scale, 4)} ${letter}`;
  return round(value, 4);
}

function duration(seconds) {
  if (seconds < 120) return `${round(seconds)} s`;
  if (seconds < 7200) return `${round(seconds / 60)} min`;
  return seconds < 172800 ? `${round(seconds / 3600)} h` : `${round(seconds / 86400)} d`;
}

const AXES = {
  step: { column: 0, label: "step", text: (value) => Math.round(value).toLocaleString("en") },
  tokens: { column: 1, label: "tokens", text: large },
  seconds: { column: 2, label: "training time", text: duration, isTime: true },
  flops: { column: 3, label: "training FLOPs", text: large },
};
const VALUE = 4;
const SHARES = /^dynsparse\/(coverage|newborn_share|pruning_ratio|sparsity)$/;

// One chart: `curves` are {key, label, run, points} with points [step, tokens, seconds, FLOPs, value]; the axis ends at `most`.
function drawChart(figure, title, curves, axisName, most, plateau) {
  const axis = AXES[axisName];
  const width = Math.max(260, figure.clientWidth), height = figure.matches(":first-child") ? 320 : 230;
  const left = 54, right = 14, top = 10, bottom = 26;
  const isShare = SHARES.test(curves[0].key);
  const known = curves.map((curve) => ({ ...curve, points: curve.points.filter((point) => point[axis.column] !== null) }));
  const all = known.flatMap((curve) => curve.points);
  const values = all.map((point) => point[VALUE]).concat(plateau === undefined ? [] : [plateau, 0]);
  let low = Math.min(...values), high = Math.max(...values);
  if (isShare || curves[0].key === "learning_rate") low = Math.min(0, low);
  const pad = 0.04 * (high - low || Math.abs(high) || 1);
  [low, high] = [low === 0 ? 0 : low - pad, high + pad];
  const x = (value) => left + (value / most) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const valueText = (value) => (isShare ? `${round(100 * value)}\u00a0%` : Math.abs(value) >= 1e4 ? large(value) : round(value, 4));

  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${title} against ${axis.label}` });
  for (const value of ticks(low, high, height / 55)) {
    picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    picture.append(svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, valueText(value)));
  }
  for (const value of ticks(0, most, Math.max(2, width / 80), axis.isTime)) {
    const anchor = x(value) > width - 30 ? "end" : "middle";
    picture.append(svg("text", { x: anchor === "end" ? width - 2 : x(value), y: height - 8, "text-anchor": anchor }, axis.text(value)));
  }
  if (plateau !== undefined) {
    picture.append(svg("line", { class: "plateau", x1: left, x2: width - right, y1: y(plateau), y2: y(plateau) }));
    picture.append(svg("text", { x: width - right, y: y(plateau) - 4, "text-anchor": "end" }, "plateau of word frequencies"));
  }
  for (const { key, run, points } of known) {
    const path = points.map((point, place) => `${place ? "L" : "M"}${x(point[axis.column]).toFixed(1)} ${y(point[VALUE]).toFixed(1)}`);
    const isThin = key === "loss" && curves.length > 1;
    const style = `stroke:var(--run-${run % 7});stroke-dasharray:${dashes(run)}`;
    picture.append(svg("path", { d: path.join(""), style, "stroke-width": isThin ? 1 : 2, opacity: isThin ? 0.6 : 1 }));
    if (key.startsWith("eval_"))
      for (const point of points)
        picture.append(svg("circle", { cx: x(point[axis.column]), cy: y(point[VALUE]), r: 3, style: `fill:var(--run-${run % 7})` }));
  }
  const readout = html("figcaption", {}, "");
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  picture.append(cursor);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = (((event.clientX - box.left) * (width / box.width) - left) / (width - left - right)) * most;
    const distance = (point) => Math.abs(point[axis.column] - at);
    const nearest = known.filter((curve) => curve.points.length).map((curve) => [curve, curve.points.reduce((best, point) => (distance(point) < distance(best) ? point : best))]);
    if (!nearest.length) return;
    const place = nearest.map(([, point]) => point).reduce((best, point) => (distance(point) < distance(best) ? point : best))[axis.column];
    put(cursor, { x1: x(place), x2: x(place), visibility: "visible" }, []);
    const many = new Set(known.map((curve) => curve.run)).size > 1;
    readout.textContent = `${axis.text(place)}: ` + nearest.map(([curve, point]) => `${many ? `${curve.name}, ` : ""}${curve.label} ${valueText(point[VALUE])}`).join("; ");
  });
  picture.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    readout.textContent = "";
  });
  figure.replaceChildren(html("h3", {}, title), picture, readout);
}

const dashes = (run) => ["none", "6 3", "2 3", "8 3 2 3"][Math.floor(run / 7) % 4];
