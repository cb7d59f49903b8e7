"use strict";
// Line plots in SVG. Everything is drawn anew when the view changes: width, zoom, axis, smoothing, colours.
// A frame holds buckets of steps: first, last, tokens, and of each series the mean, and low and high where several steps share a bucket.

const SVG = "http://www.w3.org/2000/svg";
const view = { along: "step", smooth: 0, zoom: null, hidden: new Set(), drawings: [] };

function element(parent, name, attributes = {}, text = null) {
  const made = parent instanceof SVGElement || name === "svg" ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  parent.appendChild(made);
  return made;
}

// ---- numbers

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= (unit === 1e3 ? 1e4 : unit)) return `${+(value / unit).toPrecision(4)}${letter}`;
  }
  if (size < 1e-3) return (+value.toPrecision(4)).toExponential().replace("e+", "e");
  return `${+value.toPrecision(5)}`;
}
const long = (value) => value.toLocaleString("en-GB", { maximumFractionDigits: 0 });
const inUnit = (value, unit) => short(value) + (unit === "%" ? " %" : unit && unit.length < 12 ? ` ${unit}` : "");

function ticks(low, high, about) {
  const raw = (high - low) / Math.max(1, about);
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = size * [1, 2, 5, 10].find((k) => size * k >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    if (decades > 7 && e % Math.ceil(decades / 6)) continue;
    for (const k of decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 3, 5, 7]) found.push(k * 10 ** e);
  }
  const inside = found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
  return inside.length > 1 ? inside : ticks(low, high, 4).filter((v) => v > 0);
}

// ---- the horizontal axis, common to every figure

const middle = (frame, i) => (view.along === "step" ? (frame.first[i] + frame.last[i]) / 2 : frame.tokens[i]);

function wholeSpan() {
  let high = 0;
  for (const [i, run] of DATA.runs.entries()) {
    if (view.hidden.has(i)) continue;
    for (const frame of run.frames) {
      const end = view.along === "step" ? frame.last.at(-1) : frame.tokens.at(-1);
      high = Math.max(high, end ?? 0);
    }
  }
  return [0, high || 1];
}
const span = () => view.zoom ?? wholeSpan();

// A step of a run on the axis: tokens are interpolated between buckets.
function place(run, step) {
  if (view.along === "step") return step;
  const frame = run.frames[0];
  let i = frame.last.findIndex((last) => last >= step);
  if (i < 0) i = frame.last.length - 1;
  return frame.tokens[i] * (frame.last[i] ? step / ((frame.first[i] + frame.last[i]) / 2) : 1);
}

function horizontalAxis(svg, box, x) {
  const [low, high] = span();
  for (const value of ticks(low, high, (box.right - box.left) / 90)) {
    element(svg, "path", { class: "axis", d: `M${x(value)} ${box.bottom}v4` });
    const half = 3.3 * short(value).length; // the last label must not run out of the figure
    element(svg, "text", { x: Math.min(x(value), box.right + 10 - half), y: box.bottom + 16, "text-anchor": "middle" }, short(value));
  }
  element(svg, "path", { class: "axis", d: `M${box.left} ${box.bottom}H${box.right}` });
  element(svg, "text", { x: box.right, y: box.bottom + 29, "text-anchor": "end" }, view.along === "step" ? "step" : "tokens");
}

// ---- one plot

// Exponential moving average without the bias of its start; a gap stays a gap.
function smoothed(values) {
  let sum = 0, weight = 0;
  return values.map((v) => {
    if (v === null) return null;
    sum = view.smooth * sum + (1 - view.smooth) * v;
    weight = view.smooth * weight + (1 - view.smooth);
    return sum / weight;
  });
}

function curvesOf(plot) {
  const curves = [];
  for (const [r, run] of DATA.runs.entries()) {
    if (view.hidden.has(r)) continue;
    for (const [s, [key, label]] of plot.series.entries()) {
      const frame = run.frames.find((f) => key in f.series);
      if (!frame) continue;
      const several = DATA.runs.length > 1;
      curves.push({
        run, frame, label: several ? (plot.series.length > 1 ? `${run.name}, ${label}` : run.name) : label, ...frame.series[key],
        x: frame.first.map((_, i) => middle(frame, i)),
        colour: `var(--c${several ? r : s})`, dash: several && s ? "6 4" : "none",
      });
    }
  }
  return curves;
}

function valueSpan(plot, curves, log) {
  const [from, to] = span();
  let low = Infinity, high = -Infinity;
  for (const c of curves) {
    c.x.forEach((x, i) => {
      if (x < from || x > to) return;
      for (const v of [c.mean[i], c.low?.[i] ?? null, c.high?.[i] ?? null]) {
        if (v === null || (log && v <= 0)) continue;
        low = Math.min(low, v);
        high = Math.max(high, v);
      }
    });
  }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
  if (plot.zero) low = Math.min(0, low);
  const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  return [plot.zero && low === 0 ? 0 : low - room, high + room];
}

function path(c, values, x, y) {
  let d = "", pen = "M";
  values.forEach((v, i) => {
    const at = v === null ? NaN : y(v);
    if (Number.isFinite(at)) {
      d += `${pen}${x(c.x[i]).toFixed(1)} ${at.toFixed(1)}`;
      pen = "L";
    } else pen = "M";
  });
  return d;
}

// Points without a neighbour have no line: they, and those of short series, are dots.
function dots(c, values, x, y) {
  let d = "";
  const few = values.length <= 40;
  values.forEach((v, i) => {
    const alone = (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null;
    const at = v === null ? NaN : y(v);
    if ((few || alone) && Number.isFinite(at)) d += `M${(x(c.x[i]) - 2.5).toFixed(1)} ${at.toFixed(1)}a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0 -5 0`;
  });
  return d;
}

function band(c, x, y) {
  let d = "";
  const there = c.x.map((_, i) => i).filter((i) => c.low[i] !== null && Number.isFinite(y(c.low[i])));
  if (there.length < 2) return d;
  for (const i of there) d += `${d ? "L" : "M"}${x(c.x[i]).toFixed(1)} ${y(c.high[i]).toFixed(1)}`;
  for (const i of there.reverse()) d += `L${x(c.x[i]).toFixed(1)} ${y(c.low[i]).toFixed(1)}`;
  return `${d}Z`;
}

function drawCurves(layer, curves, smooth, x, y) {
  for (const c of curves) {
    if (c.low) element(layer, "path", { class: "band", d: band(c, x, y), fill: c.colour, stroke: c.colour, opacity: 0.25 });
  }
  for (const c of curves) {
    const values = smooth ? smoothed(c.mean) : c.mean;
    if (smooth) element(layer, "path", { d: path(c, c.mean, x, y), fill: "none", stroke: c.colour, opacity: 0.3 });
    element(layer, "path", {
      class: "curve", d: path(c, values, x, y), fill: "none", stroke: c.colour, "stroke-width": 1.7, "stroke-dasharray": c.dash, "stroke-linejoin": "round",
    });
    element(layer, "path", { class: "dots", d: dots(c, values, x, y), fill: c.colour });
  }
}

// Skipped steps as red ticks on the axis, restarts as dotted lines.
function drawMarks(layer, box, x) {
  for (const [r, run] of DATA.runs.entries()) {
    if (view.hidden.has(r) || !run.frames.length) continue;
    let skip = "", start = "";
    for (const [first, last] of run.skipped) {
      const from = x(place(run, first)), to = Math.max(from, x(place(run, last)));
      skip += `M${from} ${box.bottom - 7}H${Math.max(to, from + 2)}v7H${from}Z`;
    }
    for (const step of run.starts) if (step > 0) start += `M${x(place(run, step))} ${box.top}V${box.bottom}`;
    if (start) element(layer, "path", { class: "start", d: start });
    if (skip) element(layer, "path", { class: "skip", d: skip });
  }
}

function linePlot(figure, plot) {
  const caption = element(figure, "figcaption");
  element(caption, "b", {}, plot.title);
  if (plot.unit) element(caption, "span", { class: "unit" }, plot.unit);
  const legend = element(caption, "span", { class: "legend" });
  const several = DATA.runs.length > 1;
  if (plot.series.length > 1) {
    for (const [s, [, label]] of plot.series.entries()) key(legend, label, several ? "currentColor" : `var(--c${s})`, several && s ? "6 4" : "none");
  }
  if (plot.series.some(([name]) => name === "loss")) {
    if (DATA.runs.some((run) => run.skipped.length)) key(legend, "skipped step", "var(--skip)", "none");
    if (DATA.runs.some((run) => run.starts.some((step) => step > 0))) key(legend, "restart", "var(--axis)", "1 4");
  }
  let log = plot.log;
  const button = element(caption, "button", { type: "button", "aria-pressed": log, title: "logarithmic axis" }, "log");
  const area = element(figure, "div", { class: "drawing" });
  const drawing = { area, draw, smooth: plot.smooth };
  button.addEventListener("click", () => {
    log = !log;
    button.setAttribute("aria-pressed", log);
    draw();
  });

  function draw() {
    area.replaceChildren();
    const svg = element(area, "svg", { role: "img", "aria-label": `${plot.title} ${plot.unit}` });
    const curves = curvesOf(plot);
    const positive = curves.some((c) => c.mean.some((v) => v > 0));
    const [low, high] = valueSpan(plot, curves, log && positive);
    const marks = log && positive ? logTicks(low, high) : ticks(low, high, 5);
    const box = { left: 14 + 6.6 * Math.max(...marks.map((v) => short(v).length), 1), right: area.clientWidth - 12, top: 8, bottom: area.clientHeight - 32 };
    const [from, to] = span();
    const x = (v) => box.left + ((v - from) / (to - from)) * (box.right - box.left);
    const part = log && positive ? (v) => Math.log(v / low) / Math.log(high / low) : (v) => (v - low) / (high - low);
    const y = (v) => box.bottom - part(v) * (box.bottom - box.top);
    for (const value of marks) {
      element(svg, "path", { class: "gridline", d: `M${box.left} ${y(value)}H${box.right}` });
      element(svg, "text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value));
    }
    horizontalAxis(svg, box, x);
    const layer = clipped(svg, box);
    const clips = new Set(DATA.runs.map((run) => run.clip));
    if (plot.series[0][0] === "grad_norm" && clips.size === 1) {
      const clip = [...clips][0];
      if (clip > low && clip < high) {
        element(layer, "path", { class: "reference", d: `M${box.left} ${y(clip)}H${box.right}` });
        element(layer, "text", { x: box.right - 2, y: y(clip) - 4, "text-anchor": "end" }, `clipped to ${short(clip)}`);
      }
    }
    drawCurves(layer, curves, plot.smooth && view.smooth > 0, x, y);
    drawMarks(layer, box, x);
    figure.dataset.drawn = curves.length;
    follow(drawing, svg, box, from, to, (at) => readings(plot, curves, at));
  }
  return drawing;
}

function key(parent, label, colour, dash) {
  const item = element(parent, "span", { class: "key" });
  const line = element(item, "svg", { viewBox: "0 0 22 8", "aria-hidden": "true" });
  element(line, "path", { d: "M0 4H22", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash });
  element(item, "span", {}, label);
}

let clipCount = 0;
function clipped(svg, box) {
  const id = `clip${clipCount++}`;
  const clip = element(element(svg, "defs"), "clipPath", { id });
  element(clip, "rect", { x: box.left - 3, y: box.top - 3, width: Math.max(0, box.right - box.left + 6), height: box.bottom - box.top + 6 });
  return element(svg, "g", { "clip-path": `url(#${id})` });
}

// What stands at `at` on the axis: the heading and a row a curve.
function readings(plot, curves, at) {
  const rows = [];
  let head = "";
  for (const c of curves) {
    let best = -1;
    c.x.forEach((x, i) => {
      if (c.mean[i] !== null && (best < 0 || Math.abs(x - at) < Math.abs(c.x[best] - at))) best = i;
    });
    if (best < 0) continue;
    const f = c.frame;
    const range = c.low && c.low[best] !== c.high[best] ? ` (${short(c.low[best])} – ${short(c.high[best])})` : "";
    head ||= `${steps(f.first[best], f.last[best])}, ${short(f.tokens[best] ?? 0)} tokens`;
    rows.push({ colour: c.colour, label: c.label, value: inUnit(c.mean[best], plot.unit) + range, x: c.x[best] });
  }
  return { head, rows };
}
const steps = (first, last) => (first === last ? `step ${long(first)}` : `steps ${long(first)} to ${long(last)}`);
