// Heat maps on canvas, one pixel a value, stretched: expert load of each layer, and MaxVio of all layers.

function rgb(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}
const mix = (a, b, part) => a.map((v, i) => Math.round(v + (b[i] - v) * Math.min(1, Math.max(0, part))));

// Codes of load over the even share: 0 none, else log2 from -3 (1) to 3 (255). Colours end at a quarter and four times.
const exponent = (code) => ((code - 1) / 254) * 6 - 3;
function loadColours() {
  const [under, even, over, none] = ["--under", "--even", "--over", "--none"].map(rgb);
  return Array.from({ length: 256 }, (_, code) => {
    if (code === 0) return none;
    const e = exponent(code) / 2;
    return e < 0 ? mix(even, under, -e) : mix(even, over, e);
  });
}

function decode(text) {
  const binary = atob(text);
  return Uint8Array.from(binary, (c) => c.charCodeAt(0));
}

// map: {title, remark, rows: labels, columns, colour(row, column) -> [r, g, b], reading(row, column) -> text, height}
function heatMap(figure, run, map) {
  const caption = element(figure, "figcaption");
  element(caption, "b", {}, map.title);
  element(caption, "span", { class: "unit" }, map.remark);
  const area = element(figure, "div", { class: "drawing" });
  area.style.height = `${map.height + 44}px`;
  const drawing = { area, draw };
  const load = run.load;

  // Column i reaches from the record before it to its own last.
  function edges() {
    const at = view.along === "step" ? load.last : load.tokens;
    const first = view.along === "step" ? load.first[0] - 1 : at[0] * ((load.first[0] - 1) / Math.max(1, load.last[0]));
    return [Math.max(0, first), ...at];
  }

  function draw() {
    area.replaceChildren();
    const pixels = new OffscreenCanvas(map.columns, map.rows.length);
    const image = new ImageData(map.columns, map.rows.length);
    for (let r = 0; r < map.rows.length; r++) {
      for (let c = 0; c < map.columns; c++) image.data.set([...map.colour(r, c), 255], 4 * (r * map.columns + c));
    }
    pixels.getContext("2d").putImageData(image, 0, 0);

    const widest = Math.max(...map.rows.map((label) => label.length));
    const box = { left: 14 + 6.4 * widest, right: area.clientWidth - 12, top: 6, bottom: 6 + map.height };
    const width = Math.max(1, box.right - box.left), dots = window.devicePixelRatio || 1;
    const canvas = element(area, "canvas", { width: Math.round(width * dots), height: Math.round(map.height * dots) });
    Object.assign(canvas.style, { left: `${box.left}px`, top: `${box.top}px`, width: `${width}px`, height: `${map.height}px` });
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    const [from, to] = span();
    const at = edges();
    const across = (v) => Math.round(((v - from) / (to - from)) * canvas.width);
    for (let c = 0; c < map.columns; c++) {
      const left = across(at[c]), right = across(at[c + 1]);
      if (right < 0 || left > canvas.width) continue;
      pen.drawImage(pixels, c, 0, 1, map.rows.length, left, 0, Math.max(1, right - left), canvas.height);
    }

    const svg = element(area, "svg", { role: "img", "aria-label": `${map.title}, ${map.remark}` });
    const every = 2 ** Math.max(0, Math.ceil(Math.log2((13 * map.rows.length) / map.height)));
    map.rows.forEach((label, r) => {
      if (r % every) return;
      element(svg, "text", { x: box.left - 6, y: box.top + ((r + 0.5) * map.height) / map.rows.length + 4, "text-anchor": "end" }, label);
    });
    horizontalAxis(svg, box, (v) => box.left + ((v - from) / (to - from)) * width);
    figure.dataset.drawn = map.columns;
    follow(drawing, svg, box, from, to, (value, height) => {
      const r = Math.min(map.rows.length - 1, Math.max(0, Math.floor(height * map.rows.length)));
      const c = Math.max(0, at.findIndex((end, i) => i > 0 && end >= value) - 1);
      if (value > at.at(-1) || value < at[0]) return { head: "no record", rows: [] };
      return { head: `${steps(load.first[c], load.last[c])}, ${short(load.tokens[c])} tokens`, rows: [{ label: map.name(r), value: map.reading(r, c), x: value }] };
    });
  }
  return drawing;
}

function vioMap(figure, run) {
  const load = run.load;
  const several = DATA.runs.length > 1 ? ` · ${run.name}` : "";
  const all = DATA.runs.flatMap((of) => of.load?.maxVio.flat() ?? []);
  const sorted = all.filter((v) => v !== null).sort((a, b) => a - b);
  // The first steps are far out: one scale for all runs, to the 99th percentile, so that what follows can be seen.
  const most = sorted[Math.floor(0.99 * (sorted.length - 1))] || 1;
  return heatMap(figure, run, {
    title: `MaxVio by layer${several}`, remark: `from 0 to ${short(+most.toPrecision(2))} and more`,
    rows: load.layers, columns: load.last.length, height: Math.min(260, Math.max(186, load.layers.length * 6)), name: (r) => load.layers[r],
    colour: (r, c) => mix(rgbLow, rgbHigh, (load.maxVio[r][c] ?? 0) / most),
    reading: (r, c) => `MaxVio ${short(load.maxVio[r][c] ?? 0)}`,
  });
}

let rgbLow, rgbHigh, colours;
function readColours() {
  rgbLow = rgb("--low");
  rgbHigh = rgb("--high");
  colours = loadColours();
}

function colourScale(parent) {
  const row = element(parent, "div", { class: "scale" });
  element(row, "span", {}, "¼ of the even share or less");
  const canvas = element(row, "canvas", { width: 200, height: 1 });
  element(row, "span", {}, "4× or more; the middle is even");
  element(row, "i");
  element(row, "span", {}, "no token");
  return {
    draw() {
      const pen = canvas.getContext("2d");
      for (let i = 0; i < 200; i++) {
        const code = Math.round(1 + ((-2 + (4 * i) / 199 + 3) / 6) * 254);
        pen.fillStyle = `rgb(${colours[code].join()})`;
        pen.fillRect(i, 0, 1, 1);
      }
    },
  };
}

function loadMaps(parent, run) {
  const load = run.load, T = load.last.length, E = load.experts;
  const codes = decode(load.codes);
  element(parent, "h3", {}, `Tokens routed to each expert, over the even share${DATA.runs.length > 1 ? ` · ${run.name}` : ""}`);
  const drawings = [colourScale(parent)];
  const grid = element(parent, "div", { class: "grid" });
  load.layers.forEach((layer, l) => {
    const [least, most] = load.end[l];
    const code = (r, c) => codes[(l * E + r) * T + c];
    drawings.push(heatMap(element(grid, "figure", { class: "heat" }), run, {
      title: layer, remark: `expert by step; at the end ${short(least)}× to ${short(most)}×`,
      rows: Array.from({ length: E }, (_, e) => `${e}`), columns: T, height: Math.min(200, Math.max(96, E * 10)), name: (r) => `expert ${r}`,
      colour: (r, c) => colours[code(r, c)],
      reading: (r, c) => (code(r, c) === 0 ? "no token" : `${[1, 255].includes(code(r, c)) ? (code(r, c) === 1 ? "≤ " : "≥ ") : ""}${(2 ** exponent(code(r, c))).toPrecision(3)}× the even share`),
    }));
  });
  return drawings;
}
