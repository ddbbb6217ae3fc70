// Line charts as SVG: sharp at any size, coloured by the style sheet, so that a change of theme needs no redraw.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 46, right: 12, top: 14, bottom: 34 };
const LABEL_LINE = 12; // room above the plot for what the vertical axis is in

function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function seriesColor(series, index) {
  if (series.shade !== undefined) return `color-mix(in srgb, var(--late) ${Math.round(100 * series.shade)}%, var(--early))`;
  return `var(--series-${(series.color ?? index + 1) % 7})`;
}

// Round numbers that cover [low, high].
function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 1) return linearTicks(low, high, count);
  const inside = (factors) => {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const factor of factors) ticks.push(factor * 10 ** power);
    }
    return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  };
  const choices = [[1, 2, 5], [1, 3], [1]].map(inside);
  const ticks = choices.find((choice) => choice.length <= count) || choices[2];
  const every = Math.ceil(ticks.length / Math.max(count, 1));
  return ticks.filter((_, index) => index % every === 0);
}

// A map from values to pixels, with its ticks. `axis`: {log, min, max, ticks}.
function makeScale(values, axis, from, to, count) {
  const finite = values.filter((value) => Number.isFinite(value) && (!axis.log || value > 0));
  let low = axis.min ?? (finite.length ? Math.min(...finite) : axis.log ? 1 : 0);
  let high = axis.max ?? (finite.length ? Math.max(...finite) : axis.log ? 10 : 1);
  if (axis.log) [low, high] = low === high ? [low / 2, high * 2] : [low, high];
  else if (low === high) [low, high] = [low - (low === 0 ? 0 : 0.5), high + (low === 0 ? 1 : 0.5)];
  const position = axis.log ? Math.log : (value) => value;
  const span = position(high) - position(low);
  const scale = (value) => from + ((position(value) - position(low)) / span) * (to - from);
  const inside = (axis.ticks || []).filter((tick) => tick >= low && tick <= high);
  const every = Math.ceil(inside.length / Math.max(count, 1));
  const given = inside.filter((_, index) => index % every === 0);
  scale.ticks = axis.ticks ? given : axis.log ? logTicks(low, high, count) : linearTicks(low, high, count);
  return scale;
}

// A chart. `spec`: {title, note, x, y, series: [{name, color or shade, dashed, dots, points: [[x, y|null], …]}],
// events: [{x, label, color}], height}; x and y are {label, log, min, max, ticks, unit}. `onHover(x or null)` is told where the pointer is.
function lineChart(spec, onHover) {
  const node = el("div", "chart");
  const canvas = svg("svg", { role: "img", tabindex: 0 });
  const keys = el("div", "keys");
  if (spec.height) node.style.setProperty("--height", spec.height + "px");
  if (spec.title) node.append(el("h4", null, readable(spec.title)));
  if (spec.note) node.append(el("div", "note muted", readable(spec.note)));
  node.append(keys, canvas);
  const at = el("span", "reading at");
  const readings = spec.series.map((series, index) => {
    const swatch = el("span", "swatch" + (series.dashed ? " dashed" : ""));
    swatch.style.borderColor = seriesColor(series, index);
    const reading = el("span", "reading");
    keys.append(el("span", "key", null, swatch, readable(series.name), reading));
    return reading;
  });
  keys.append(at);
  canvas.setAttribute("aria-label", `${spec.title || ""}: ${spec.y.label || ""} against ${spec.x.label || ""}; arrow keys read values`);

  const xs = [...new Set(spec.series.flatMap((series) => series.points.map((point) => point[0])))].sort((a, b) => a - b);
  const tables = spec.series.map((series) => new Map(series.points));
  let scaleX = null;
  let bounds = null;
  let marked = null;
  const mark = svg("line", { class: "mark", visibility: "hidden" });

  function draw() {
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (width < 80 || height < 60) return;
    bounds = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top + (spec.y.label ? LABEL_LINE : 0), bottom: height - MARGIN.bottom };
    const ys = spec.series.flatMap((series) => [...series.points.map((point) => point[1]), ...(series.spread || []).flatMap((bar) => bar.slice(1))]);
    scaleX = makeScale(xs, spec.x, bounds.left, bounds.right, Math.floor((bounds.right - bounds.left) / 56));
    const scaleY = makeScale(ys, spec.y, bounds.bottom, bounds.top, Math.floor((bounds.bottom - bounds.top) / 32));
    canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
    canvas.replaceChildren(...axes(spec, scaleX, scaleY, bounds), ...events(spec, scaleX, bounds));
    spec.series.forEach((series, index) => canvas.append(...curve(series, index, scaleX, scaleY)));
    canvas.append(mark);
    placeMark();
  }

  function placeMark() {
    const shown = marked !== null && scaleX;
    mark.setAttribute("visibility", shown ? "visible" : "hidden");
    if (!shown) return;
    const x = scaleX(marked);
    for (const [name, value] of Object.entries({ x1: x, x2: x, y1: bounds.top, y2: bounds.bottom })) mark.setAttribute(name, value);
  }

  // Reads every series at a value of x (null: none).
  function read(x) {
    marked = x;
    at.textContent = x === null ? "" : `${spec.x.label || "x"} ${formatNumber(x)}`;
    readings.forEach((reading, index) => {
      const value = x === null ? undefined : tables[index].get(x);
      reading.textContent = value === undefined || value === null ? "" : formatNumber(value) + (spec.y.unit ? " " + spec.y.unit : "");
    });
    placeMark();
  }

  function move(x) {
    read(x);
    onHover?.(x);
  }

  canvas.addEventListener("pointermove", (event) => {
    if (!scaleX || !xs.length) return;
    const pointer = event.clientX - canvas.getBoundingClientRect().left;
    move(xs.reduce((best, x) => (Math.abs(scaleX(x) - pointer) < Math.abs(scaleX(best) - pointer) ? x : best)));
  });
  canvas.addEventListener("pointerleave", () => move(null));
  canvas.addEventListener("blur", () => move(null));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !xs.length) return;
    event.preventDefault();
    const index = xs.indexOf(marked);
    move(xs[index < 0 ? (step > 0 ? 0 : xs.length - 1) : clamp(index + step, 0, xs.length - 1)]);
  });
  new ResizeObserver(throttled(draw)).observe(canvas);
  return { node, read };
}

function axes(spec, scaleX, scaleY, bounds) {
  const nodes = [];
  for (const tick of scaleY.ticks) {
    const y = scaleY(tick);
    nodes.push(svg("line", { class: "grid", x1: bounds.left, x2: bounds.right, y1: y, y2: y }));
    nodes.push(svg("text", { x: bounds.left - 6, y: y + 4, "text-anchor": "end" }, formatNumber(tick)));
  }
  for (const tick of scaleX.ticks) {
    const x = scaleX(tick);
    nodes.push(svg("line", { class: "grid", x1: x, x2: x, y1: bounds.bottom, y2: bounds.bottom + 4 }));
    nodes.push(svg("text", { x, y: bounds.bottom + 16, "text-anchor": "middle" }, formatNumber(tick)));
  }
  nodes.push(svg("text", { x: bounds.right, y: bounds.bottom + 30, "text-anchor": "end" }, spec.x.label || ""));
  nodes.push(svg("text", { x: 0, y: 8 }, spec.y.label || ""));
  return nodes;
}

// Lines first, so that none goes through a label.
function events(spec, scaleX, bounds) {
  const lines = [];
  const labels = [];
  (spec.events || []).forEach((event, index) => {
    const x = scaleX(event.x);
    if (!(x >= bounds.left && x <= bounds.right)) return;
    const anchor = x > (bounds.left + bounds.right) / 2 ? "end" : "start";
    const offset = anchor === "end" ? -4 : 4;
    lines.push(svg("line", { class: "event", x1: x, x2: x, y1: bounds.top, y2: bounds.bottom, style: eventStyle(event) }));
    labels.push(svg("text", { class: "event-label", x: x + offset, y: bounds.top + 12 + 14 * index, "text-anchor": anchor }, readable(event.label)));
  });
  return [...lines, ...labels];
}

function eventStyle(event) {
  return event.color === undefined ? "" : `stroke: ${seriesColor(event, 0)}`;
}

function curve(series, index, scaleX, scaleY) {
  let path = "";
  let drawing = false;
  const nodes = [];
  for (const [x, y] of series.points) {
    const px = scaleX(x);
    const py = y === null ? NaN : scaleY(y);
    if (!Number.isFinite(px) || !Number.isFinite(py)) {
      drawing = false;
      continue;
    }
    path += `${drawing ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`;
    drawing = true;
    if (series.dots) nodes.push(svg("circle", { cx: px, cy: py, r: 3, style: `fill: ${seriesColor(series, index)}` }));
  }
  for (const [x, low, high] of series.spread || []) nodes.push(spreadBar(scaleX(x), scaleY(low), scaleY(high), seriesColor(series, index)));
  const line = svg("path", { d: path, class: "series" + (series.dashed ? " dashed" : ""), style: `stroke: ${seriesColor(series, index)}` });
  return [line, ...nodes];
}

// From a low to a high value, with feet.
function spreadBar(x, low, high, color) {
  const d = `M${x - 4} ${low}h8M${x} ${low}V${high}M${x - 4} ${high}h8`;
  return svg("path", { d, class: "spread", style: `stroke: ${color}` });
}
