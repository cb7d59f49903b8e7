// Puts the figures into the page and wires what is common to them: cursor, tooltip, zoom, controls.

const DATA = JSON.parse(document.getElementById("figures").textContent);
const tip = document.getElementById("tip");

// A figure that fails must not look like one without data.
window.addEventListener("error", (event) => {
  const fault = document.getElementById("fault");
  fault.textContent = `A figure could not be drawn: ${event.message}`;
  fault.hidden = false;
  document.documentElement.dataset.fault = event.message;
});

// Cursor, tooltip and zoom of one drawing; read(value on the axis, height from 0 at the top to 1) gives the tooltip's text.
function follow(drawing, svg, box, from, to, read) {
  const across = (event) => {
    const left = svg.getBoundingClientRect().left;
    return Math.min(box.right, Math.max(box.left, event.clientX - left));
  };
  const value = (px) => from + ((px - box.left) / Math.max(1, box.right - box.left)) * (to - from);
  const cursor = element(svg, "path", { class: "cursor", d: "", visibility: "hidden" });
  let zoom = null, began = 0;
  drawing.point = (at) => {
    const px = at === null ? NaN : box.left + ((at - from) / (to - from)) * (box.right - box.left);
    const inside = px >= box.left && px <= box.right;
    cursor.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) cursor.setAttribute("d", `M${px.toFixed(1)} ${box.top}V${box.bottom}`);
  };
  svg.addEventListener("pointermove", (event) => {
    const px = across(event);
    const top = svg.getBoundingClientRect().top;
    const { head, rows } = read(value(px), (event.clientY - top - box.top) / (box.bottom - box.top));
    for (const d of view.drawings) d.point?.(rows.length ? rows[0].x : value(px));
    showTip(event, head, rows);
    if (zoom) {
      zoom.setAttribute("x", Math.min(px, began));
      zoom.setAttribute("width", Math.abs(px - began));
    }
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    for (const d of view.drawings) d.point?.(null);
  });
  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.pointerType === "touch") return;
    svg.setPointerCapture(event.pointerId);
    began = across(event);
    zoom = element(svg, "rect", { class: "zoom", x: began, y: box.top, width: 0, height: box.bottom - box.top });
  });
  svg.addEventListener("pointerup", (event) => {
    if (!zoom) return;
    const ends = [began, across(event)].sort((a, b) => a - b);
    zoom.remove();
    zoom = null;
    if (ends[1] - ends[0] > 5) setZoom(ends.map(value));
  });
  svg.addEventListener("dblclick", () => setZoom(null));
}

function showTip(event, head, rows) {
  tip.replaceChildren();
  element(tip, "div", { class: "head" }, head);
  for (const row of rows) {
    const line = element(tip, "div");
    if (row.colour) element(line, "i", { class: "swatch" }).style.background = row.colour;
    element(line, "span", {}, row.label);
    element(line, "span", { class: "value" }, row.value);
  }
  tip.hidden = false;
  const left = event.clientX + 16 + tip.offsetWidth > window.innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
  const top = Math.min(event.clientY + 12, window.innerHeight - tip.offsetHeight - 6);
  Object.assign(tip.style, { left: `${Math.max(4, left)}px`, top: `${Math.max(4, top)}px` });
}

function setZoom(to) {
  view.zoom = to;
  document.getElementById("reset").disabled = to === null;
  drawAll();
}

function drawAll() {
  readColours();
  for (const drawing of view.drawings) drawing.draw();
}

function controls() {
  const along = document.getElementById("along"), smooth = document.getElementById("smooth");
  along.addEventListener("change", () => {
    view.along = along.value;
    setZoom(null);
  });
  smooth.addEventListener("input", () => {
    view.smooth = +smooth.value;
    document.getElementById("smooth-value").textContent = view.smooth ? view.smooth.toFixed(2) : "off";
    for (const drawing of view.drawings) if (drawing.smooth) drawing.draw();
  });
  document.getElementById("reset").addEventListener("click", () => setZoom(null));
  if (DATA.runs.length < 2) return;
  for (const [i, run] of DATA.runs.entries()) {
    const label = element(document.getElementById("runs"), "label");
    const box = element(label, "input", { type: "checkbox" });
    box.checked = true;
    element(label, "i", { class: `swatch c${i}` });
    element(label, "span", {}, run.name);
    box.addEventListener("change", () => {
      if (box.checked) view.hidden.delete(i);
      else view.hidden.add(i);
      drawAll();
    });
  }
}

if (DATA.sections.length) {
  controls();
  for (const figure of document.querySelectorAll("figure[data-plot]")) {
    view.drawings.push(linePlot(figure, DATA.sections[figure.dataset.section].plots[figure.dataset.plot]));
  }
  for (const figure of document.querySelectorAll("figure[data-vio]")) view.drawings.push(vioMap(figure, DATA.runs[figure.dataset.vio]));
  for (const parent of document.querySelectorAll("[data-load]")) view.drawings.push(...loadMaps(parent, DATA.runs[parent.dataset.load]));
  drawAll();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) drawAll(); // not for a phone's address bar
    width = window.innerWidth;
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
}
