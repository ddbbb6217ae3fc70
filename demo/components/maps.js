// Attention maps of one layer and head, linked with one another and with the text; see maps.py.
const root = element.querySelector(".view");
const empty = el("div", "empty", options.empty);
const body = el("div");
const tip = el("div", "tip");
const probes = ["ink", "muted", "panel", "s1", "s2", "s3", "s4", "s5", "s6"].map((name) => el("span", `probe ${name}`));
const live = el("div", "unseen");
tip.hidden = true;
live.setAttribute("role", "status");
root.append(empty, body, tip, live, ...probes);

let view = null;
let maps = [];
let figures = [];
let charts = [];
let tokenSpans = [];
let readout = null;
let steps = []; // {node, fill(row)}; the first one sums up
let next = null; // {node, fill(row)}
let hovered = null; // {row, column}
let locked = null;

const board = {
  tokens: [],
  labels: [],
  start: 0,
  zoom: { row: 0, column: 0, size: 1 },
  contrast: "root",
  colors: {},
  font: "monospace",
  focus: () => hovered ?? locked,

  hover(cell, figure, event) {
    hovered = cell;
    if (cell && figure) showTip(figure, event);
    else tip.hidden = true;
    refresh();
  },

  toggle(cell) {
    locked = !cell || (locked && locked.row === cell.row && locked.column === cell.column) ? null : cell;
    refresh();
  },

  scrollTo(row, column) {
    const last = board.tokens.length - board.zoom.size;
    board.zoom.row = clamp(row, 0, last);
    board.zoom.column = clamp(column, 0, last);
    refresh();
  },

  // Shows fewer or more tokens, around a cell (default: the one pointed at, else the middle).
  zoomBy(factor, cell = board.focus()) {
    const { zoom, tokens } = board;
    const before = zoom.size;
    const center = cell ?? { row: zoom.row + before / 2, column: zoom.column + before / 2 };
    const smallest = Math.min(SMALLEST_ZOOM, tokens.length);
    zoom.size = clamp(Math.round(before / factor), smallest, tokens.length);
    const keep = (middle, first) => Math.round(middle - ((middle - first) * zoom.size) / before);
    board.scrollTo(keep(center.row, zoom.row), keep(center.column, zoom.column));
  },

  // Answers a key; true if it was one of ours.
  key(key, figure) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (key in moves) moveLocked(...moves[key]);
    else if (key === "Home") moveLocked(0, -board.tokens.length);
    else if (key === "End") moveLocked(0, board.tokens.length);
    else if (key === "Enter" || key === " ") board.toggle(board.focus());
    else if (key === "Escape") locked = hovered = null;
    else if (key === "+" || key === "=") board.zoomBy(1.5);
    else if (key === "-" || key === "−") board.zoomBy(1 / 1.5);
    else return false;
    if (locked && figure && key !== "Escape") showTip(figure);
    else tip.hidden = true;
    refresh();
    return true;
  },
};

function moveLocked(rows, columns) {
  const last = board.tokens.length - 1;
  const from = locked ?? { row: last - rows, column: strongest(last) - columns };
  const row = clamp(from.row + rows, 0, last);
  locked = { row, column: clamp(from.column + columns, 0, row) };
  hovered = null;
  const { zoom } = board;
  const keepIn = (index, first) => clamp(first, index - zoom.size + 1, index);
  board.scrollTo(keepIn(locked.row, zoom.row), keepIn(locked.column, zoom.column));
}

function strongest(row) {
  let best = 0;
  for (let column = 1; column <= row; column++) {
    if (maps[0].values[triangleIndex(row, column)] > maps[0].values[triangleIndex(row, best)]) best = column;
  }
  return best;
}

// Values of a map, or of the difference of two.
function valuesOf(map, known) {
  if (map.data) return decodeHalves(map.data);
  const [first, second] = map.of.map((key) => known.find((other) => other.key === key).values);
  return first.map((value, index) => value - second[index]);
}

function load() {
  maps = [];
  for (const map of [...view.maps, ...(view.parts || [])]) maps.push({ ...map, values: valuesOf(map, maps) });
  const largest = {};
  for (const map of maps) {
    const scale = map.scale || map.key;
    largest[scale] = map.values.reduce((most, value) => Math.max(most, Math.abs(value)), largest[scale] || 0);
  }
  for (const map of maps) if (map.labels) map.branches = decodeBytes(map.labels);
  for (const map of maps) map.largest = map.limit ?? largest[map.scale || map.key];
}

function readColors() {
  const [ink, muted, panel, ...series] = probes.map((probe) => getComputedStyle(probe).color);
  board.colors = { ink, muted, panel };
  board.branchColors = series.map((color) => color.match(/[\d.]+/g).slice(0, 3).map(Number));
  board.font = getComputedStyle(root).getPropertyValue("--mono").trim() || "monospace";
}

function build() {
  const value = props.value ? JSON.parse(JSON.stringify(props.value)) : null;
  const sameText = view && value && view.start === value.start && view.tokens.join("\u0000") === value.tokens.join("\u0000");
  view = value;
  empty.hidden = view !== null;
  body.hidden = view === null;
  if (!view) return;
  if (!sameText) {
    hovered = locked = null;
    board.zoom = { row: 0, column: 0, size: view.tokens.length };
  }
  board.tokens = view.tokens;
  live.textContent = `${view.title}: the maps are shown.`;
  board.labels = view.tokens.map((token) => shorten(visible(token), 10));
  board.start = view.start || 0;
  load();
  readColors();
  figures = maps.map((map) => new MapFigure(map, board));
  const count = view.maps.length;
  readout = buildReadout();
  steps = buildSteps();
  next = buildNext();
  charts = (view.rows || []).map(buildChart);
  body.replaceChildren(
    buildToolbar(),
    ...buildStrip(),
    ...(view.says || []).map((sentence) => el("div", "says", sentence)),
    el("div", "figures", null, ...figures.slice(0, count).map((figure) => figure.node)),
    readout.node,
    section("The text", buildTokens(), "Coloured by what the chosen token reads in the first map; point at a token to choose it."),
    ...buildReach(),
    ...(steps.length ? [section("How this token reads, step by step", el("ol", "steps", null, ...steps.slice(1).map((step) => step.node)))] : []),
    ...(next ? [section("What comes next", next.node, "After the chosen token, and on the whole part shown.")] : []),
    ...(charts.length ? [section("For each token", el("div", "curves", null, ...charts.map((chart) => chart.node)))] : []),
    ...(figures.length > count ? [section("Inside this method", partsGrid(count))] : []),
    ...(view.tables?.length ? [section("Learned", el("div", "curves", null, ...view.tables.map(buildTable)))] : []),
  );
  refresh();
}

function partsGrid(count) {
  return el("div", "figures parts", null, ...figures.slice(count).map((figure) => figure.node));
}

function section(title, content, note) {
  const node = el("section", "section", null, el("h3", null, title));
  if (note) node.append(el("div", "muted small", note));
  node.append(content);
  return node;
}

// A button is called by what is written on it, and then by what it does; signs alone say nothing.
function button(text, label, action, className) {
  const node = el("button", className, text);
  node.type = "button";
  if (label) node.setAttribute("aria-label", /\p{L}/u.test(text) ? `${text}: ${label}` : label);
  node.title = label || text;
  node.addEventListener("click", action);
  return node;
}

function buildToolbar() {
  const contrast = el("select");
  for (const [key, name] of [["linear", "linear"], ["root", "square root"], ["log", "logarithm"]]) {
    const option = el("option", null, name);
    option.value = key;
    option.selected = key === board.contrast;
    contrast.append(option);
  }
  contrast.addEventListener("change", () => {
    board.contrast = contrast.value;
    repaint();
  });
  return el(
    "div", "toolbar", null,
    el("h3", "title", view.title),
    el("label", "muted", "Colour scale", contrast),
    button("−", "Zoom out", () => board.zoomBy(1 / 1.6), "square"),
    button("+", "Zoom in", () => board.zoomBy(1.6), "square"),
    button("Whole", "Show the whole map", () => board.zoomBy(1e-9)),
    button("PNG", "Download the maps as a picture", downloadPicture),
    button("SVG", "Download the maps as a drawing", downloadDrawing),
    button("JSON", "Download the maps as numbers", downloadNumbers),
    ...(options.sheet ? [button("HTML", "Download this view as a page of its own", downloadPage)] : []),
  );
}

function repaint() {
  readColors();
  for (const figure of figures) figure.paint();
  refresh();
}

function buildReadout() {
  const where = el("div", "where");
  where.setAttribute("aria-live", "polite");
  const cells = maps.map((map) => {
    const value = el("span", "number mono");
    return { map, value, node: el("div", "line", null, el("span", "muted", map.title), value) };
  });
  const ranked = maps.slice(0, view.maps.length).filter((map) => map.kind !== "difference");
  const rankings = ranked.map((map) => {
    const lines = Array.from({ length: 5 }, () => {
      const name = el("span", "mono");
      const value = el("span", "number");
      return { name, value, node: el("div", "line read", null, name, value) };
    });
    return { map, lines, node: el("div", null, null, el("div", "muted", `Read most: ${map.title}`), ...lines.map((line) => line.node)) };
  });
  const values = el("div", null, null, el("div", "muted", "Value of the cell"), ...cells.map((cell) => cell.node));
  const grid = el("div", "readings", null, values, ...rankings.map((ranking) => ranking.node));
  const summary = el("div", "summary");
  const reach = options.standalone ? [] : [button("Reach", "Find the tokens that change what comes after this one", askForReach)];
  const node = el("div", "readout", null, el("div", "line top", null, where, ...reach), summary, grid);
  return { node, where, summary, cells, rankings };
}

// A sentence with gaps that are filled for a token; see steps.py.
function buildSteps() {
  return (view.steps || []).map(({ text, values }) => {
    const pieces = text.split("{}");
    const gaps = values.map(() => el("b"));
    const node = el("li", null, null, ...pieces.flatMap((piece, index) => (index < gaps.length ? [piece, gaps[index]] : [piece])));
    const fill = (row) => {
      gaps.forEach((gap, index) => (gap.textContent = said(values[index][row])));
      return node.textContent;
    };
    return { node, fill };
  });
}

function said(value) {
  return typeof value === "number" ? formatNumber(value) : String(value ?? "–");
}

// What each model expects after the chosen token, and its figures on the part shown.
function buildNext() {
  const models = view.next?.models || [];
  if (!models.length) return null;
  const columns = models.map((model) => {
    const kl = el("div", "muted small");
    const lines = (model.top[0] || []).map(() => {
      const name = el("span", "mono");
      const value = el("span", "number");
      return { name, value, node: el("div", "line read", null, name, value) };
    });
    const figures = [`perplexity ${formatNumber(model.perplexity)}`];
    if (model.kl !== null) figures.push(`KL ${formatNumber(model.kl)} nats`, `same first choice ${percent(model.agreement)}`);
    const node = el("div", null, null, el("h4", null, readable(model.name)), el("div", "muted small", figures.join(" · ")), kl, ...lines.map((line) => line.node));
    const fill = (row) => {
      kl.textContent = model.kls ? `here KL ${formatNumber(model.kls[row])} nats` : "here it is what the others are measured by";
      lines.forEach(({ name, value, node }, index) => {
        const [token, probability] = model.top[row][index];
        name.textContent = shorten(visible(token), 18);
        value.textContent = percent(probability);
        node.style.setProperty("--share", 100 * probability + "%");
      });
    };
    return { node, fill };
  });
  return { node: el("div", "readings next", null, ...columns.map((column) => column.node)), fill: (row) => columns.forEach((column) => column.fill(row)) };
}

function percent(share) {
  return share === null || share === undefined ? "–" : (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %";
}

// Which part of a longer text is shown; a click or the arrow keys move it.
function buildStrip() {
  const shown = board.tokens.length;
  if (!view.total || view.total <= shown || options.standalone) return [];
  const last = view.total - shown;
  const move = (start) => trigger("select", { start: clamp(Math.round(start), 0, last) });
  const bar = el("div", "bar", null, el("span", "part"));
  bar.style.setProperty("--from", (100 * view.start) / view.total + "%");
  bar.style.setProperty("--size", (100 * shown) / view.total + "%");
  bar.addEventListener("click", (event) => {
    const box = bar.getBoundingClientRect();
    move(((event.clientX - box.left) / box.width) * view.total - shown / 2);
  });
  const step = Math.max(1, Math.round(shown * 0.75));
  const earlier = button("◀ Earlier", "Show an earlier part of the text", () => move(view.start - step));
  const later = button("Later ▶", "Show a later part of the text", () => move(view.start + step));
  earlier.disabled = view.start <= 0;
  later.disabled = view.start >= last;
  return [el("div", "strip", null, earlier, bar, later)];
}

function askForReach() {
  const row = (locked ?? hovered)?.row ?? board.tokens.length - 1;
  trigger("select", { reach: row });
}

// Which tokens change what is predicted after one of them.
function buildReach() {
  const { reach } = view;
  if (!reach) return [];
  const most = Math.max(...reach.models.flatMap((model) => model.effects), 1e-12);
  const level = (effect) => (effect > 1e-8 ? 0.15 + 0.85 * clamp(1 + Math.log10(effect / most) / 5, 0, 1) : 0);
  const blocks = reach.models.map((model) => {
    const box = el("div", "tokens reached");
    box.dir = "ltr";
    model.effects.forEach((effect, index) => {
      const span = el("span", index === reach.row ? "token query" : "token", readable(board.tokens[index]));
      span.title = `${formatNumber(effect)} nats`;
      span.style.setProperty("--share", level(effect));
      box.append(span);
    });
    const before = model.before ? `, ${model.before} of them before the part shown` : "";
    return el("div", null, null, el("h4", null, readable(model.name)), el("div", "muted small", `reached by ${model.reached} of ${reach.of} tokens${before}`), box);
  });
  const groups = reach.together > 1 ? ` ${reach.together} neighbours are changed at a time.` : "";
  const note = `Each token is changed to another one; the colour is how far that moves what is predicted after ${named(reach.row)} (KL, five powers of ten). No colour: no effect at all.${groups}`;
  return [section("Reach", el("div", "figures", null, ...blocks), note)];
}

function named(index) {
  return `“${shorten(visible(board.tokens[index]), 18)}” (${index + board.start})`;
}

function updateReadout(focus) {
  const { where, summary, cells, rankings } = readout;
  const row = focus ? focus.row : board.tokens.length - 1;
  summary.textContent = steps.length ? named(row) + ": " + steps[0].fill(row) : "";
  for (const step of steps) step.fill(row);
  next?.fill(row);
  where.classList.toggle("muted", !focus);
  where.textContent = focus ? describe(focus) : "Point at a cell to read it, click to keep it; arrow keys move the kept cell.";
  for (const { map, value } of cells) {
    const number = focus && focus.column <= focus.row ? map.values[triangleIndex(focus.row, focus.column)] : null;
    value.textContent = number === null ? "–" : (map.kind === "difference" && number > 0 ? "+" : "") + formatNumber(number);
  }
  for (const { map, lines } of rankings) {
    const order = focus ? strongestKeys(map, focus.row, lines.length) : [];
    const most = order.length ? map.values[triangleIndex(focus.row, order[0])] : 0;
    lines.forEach(({ name, value, node }, index) => {
      const column = order[index];
      const number = column === undefined ? null : map.values[triangleIndex(focus.row, column)];
      name.textContent = column === undefined ? "–" : shorten(visible(board.tokens[column]), 18) + "  " + (column + board.start);
      value.textContent = number === null ? "" : formatNumber(number);
      node.style.setProperty("--share", number === null || most <= 0 ? "0%" : (100 * number) / most + "%");
    });
  }
}

function describe(focus) {
  const kept = locked && !hovered ? " · kept, Esc lets go" : "";
  if (focus.column > focus.row) return `${named(focus.row)} cannot read ${named(focus.column)}: it comes later${kept}`;
  return `${named(focus.row)} reads ${named(focus.column)}${kept}`;
}

function strongestKeys(map, row, count) {
  const start = triangleIndex(row, 0);
  const best = [];
  for (let column = 0; column <= row; column++) {
    const value = map.values[start + column];
    if (!(value > 0) || (best.length === count && value <= map.values[start + best[count - 1]])) continue;
    const at = best.findIndex((other) => map.values[start + other] < value);
    best.splice(at < 0 ? best.length : at, 0, column);
    best.length = Math.min(best.length, count);
  }
  return best;
}

function buildTokens() {
  const box = el("div", "tokens");
  box.dir = "ltr";
  tokenSpans = board.tokens.map((token, index) => {
    const span = el("span", "token");
    for (const piece of readable(token).split(/(\n)/)) {
      if (piece === "\n") span.append(el("span", "return", "↵"));
      span.append(piece);
    }
    span.dataset.index = index;
    box.append(span);
    return span;
  });
  const cellOf = (event) => {
    const span = event.target.closest(".token");
    const row = span ? Number(span.dataset.index) : null;
    return row === null ? null : { row, column: strongest(row) };
  };
  box.addEventListener("pointerover", (event) => board.hover(cellOf(event)));
  box.addEventListener("pointerleave", () => board.hover(null));
  box.addEventListener("click", (event) => board.toggle(cellOf(event)));
  return box;
}

function updateTokens(focus) {
  const row = focus ? focus.row : -1;
  const start = focus ? triangleIndex(row, 0) : 0;
  const { values } = maps[0];
  const most = focus ? values[start + strongest(row)] : 0;
  tokenSpans.forEach((span, index) => {
    const share = most > 0 && index <= row ? Math.sqrt(Math.max(values[start + index], 0) / most) : 0;
    let name = "token";
    if (index === row) name += " query";
    else if (focus && index > row) name += " later";
    else if (focus && index === focus.column) name += " read-key";
    paintToken(span, name, Math.round(20 * share) / 20);
  });
}

// Touches only what changes: there are hundreds of tokens, and the pointer moves fast.
function paintToken(span, name, share) {
  if (span.className !== name) span.className = name;
  if (span.share !== share) {
    span.share = share;
    span.style.setProperty("--share", share);
  }
}

function buildChart(rows) {
  const points = (values) => values.map((value, index) => [index + board.start, value]);
  const spec = {
    title: rows.title,
    note: rows.note,
    height: 150,
    x: { label: "token" },
    y: { label: "", unit: rows.unit, log: rows.log, min: rows.min, max: rows.max },
    series: rows.series.map(({ values, ...series }) => ({ ...series, points: points(values) })),
  };
  return lineChart(spec, (x) => board.hover(x === null ? null : { row: x - board.start, column: strongest(x - board.start) }));
}

function buildTable(table) {
  const head = el("tr", null, null, el("th"), ...table.columns.map((name) => el("th", null, name)));
  const most = Math.max(...table.rows.flatMap((row) => row.values.map((value) => Math.abs(value ?? 0))), 1e-12);
  const rows = table.rows.map((row) => {
    const cells = row.values.map((value) => {
      const cell = el("td", null, formatNumber(value));
      cell.style.setProperty("--share", Math.abs(value ?? 0) / most);
      return cell;
    });
    return el("tr", null, null, el("th", null, row.name), ...cells);
  });
  const node = el("table", "weights", null, el("thead", null, null, head), el("tbody", null, null, ...rows));
  const title = el("h4", null, table.title);
  return el("div", null, null, title, el("div", "small muted", table.note), el("div", "scroller", null, node));
}

// The value beside the pointer, or beside the kept cell where there is no pointer.
function showTip(figure, event) {
  const focus = board.focus();
  if (!focus) {
    tip.hidden = true;
    return;
  }
  const value = figure.value(focus.row, focus.column);
  const number = value === undefined ? "comes later" : formatNumber(value);
  tip.textContent = `${shorten(visible(board.tokens[focus.row]), 14)} → ${shorten(visible(board.tokens[focus.column]), 14)}  ${number}`;
  tip.hidden = false;
  const frame = root.getBoundingClientRect();
  const box = figure.canvas.getBoundingClientRect();
  const { gutter, cell } = figure.layout();
  const x = event ? event.clientX : box.left + gutter + (focus.column - board.zoom.column + 0.5) * cell;
  const y = event ? event.clientY : box.top + gutter + (focus.row - board.zoom.row + 0.5) * cell;
  const left = clamp(x - frame.left + 14, 0, Math.max(0, frame.width - tip.offsetWidth));
  const above = y - frame.top - tip.offsetHeight - 12;
  tip.style.transform = `translate(${left}px, ${Math.max(above, 0)}px)`;
}

const refresh = throttled(() => {
  if (!view) return;
  const focus = board.focus();
  for (const figure of figures) figure.draw();
  updateReadout(focus);
  updateTokens(focus);
  for (const chart of charts) chart.read(focus ? focus.row + board.start : null);
});

function save(blob, extension) {
  const link = el("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${view.file || "attention"}.${extension}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function drawing() {
  const focus = board.focus();
  const row = focus ? focus.row : board.tokens.length - 1;
  const sentences = [...(view.says || []), ...(steps.length ? [`${named(row)}: ${steps[0].fill(row)}`] : [])];
  return drawMaps(figures, board, view.title, sentences, tokensRead(row));
}

// Every token with the share that a row reads of it, on the scale of the text's colours.
function tokensRead(row) {
  const start = triangleIndex(row, 0);
  const most = maps[0].values[start + strongest(row)];
  return board.tokens.map((token, index) => ({
    text: readable(token),
    share: most > 0 && index <= row ? Math.sqrt(Math.max(maps[0].values[start + index], 0) / most) : 0,
    chosen: index === row,
  }));
}

function downloadDrawing() {
  save(new Blob([drawing().text], { type: "image/svg+xml" }), "svg");
}

// The drawing, painted at twice its size.
function downloadPicture() {
  const { text, width, height } = drawing();
  const picture = new Image();
  picture.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = 2 * width;
    canvas.height = 2 * height;
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(blob, "png"));
  };
  picture.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
}

function downloadPage() {
  const value = JSON.stringify(view).replace(/</g, "\\u003c").replace(/\u2028/g, "\\u2028").replace(/\u2029/g, "\\u2029");
  const page = options.sheet.replace("DARK", () => (isDark() ? "dark" : "")).replace("VALUE", () => value);
  save(new Blob([page], { type: "text/html" }), "html");
}

function downloadNumbers() {
  const round = (value) => Number(value.toPrecision(4));
  const triangle = (values) => board.tokens.map((_, row) => Array.from(values.subarray(triangleIndex(row, 0), triangleIndex(row + 1, 0)), round));
  const data = {
    title: view.title,
    start: board.start,
    tokens: view.tokens,
    maps: Object.fromEntries(maps.map((map) => [map.key, triangle(map.values)])),
    rows: view.rows || [],
    tables: view.tables || [],
  };
  save(new Blob([JSON.stringify(data)], { type: "application/json" }), "json");
}

onTheme(() => view && repaint());
watch("value", build);
build();
