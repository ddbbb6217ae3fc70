// Columns of tokens; see tokens.py.
const root = element.querySelector(".view");
const grid = el("div", "columns");
const card = el("div", "card");
const legend = buildLegend();
root.append(grid, legend, card);
card.hidden = true;
card.setAttribute("role", "status");

const columns = [];
let hovered = null; // {column, index}
let locked = null;

function buildLegend() {
  const scale = el("span", null, null, props.legend + ": none ", el("span", "ramp"), " large");
  const mark = el("span", null, null, el("span", "difference", "≠"), " first token that differs from the base's text");
  return el("div", "legend muted hidden", null, scale, mark);
}

function addColumn() {
  const column = {
    node: el("section", "column"),
    title: el("h4"),
    note: el("div", "note muted"),
    text: el("div", "text"),
    status: el("div", "status muted"),
    tokens: [],
    spans: [],
  };
  column.text.setAttribute("role", "group");
  column.text.dir = "ltr";
  column.node.append(column.title, column.note, column.text, column.status);
  grid.append(column.node);
  columns.push(column);
  return column;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function paintToken(span, token) {
  span.className = "token";
  span.classList.toggle("prompt", Boolean(token.prompt));
  span.classList.toggle("parts", Boolean(token.parts));
  const scored = token.score !== null && token.score !== undefined && !token.prompt;
  span.classList.toggle("scored", scored);
  span.style.setProperty("--score", scored ? Math.sqrt(clamp(token.score, 0, 1)) : 0); // small scores can be seen too
  span.replaceChildren();
  for (const piece of readable(token.text).split(/(\n)/)) {
    if (piece === "\n") span.append(el("span", "return", "↵"));
    span.append(piece);
  }
}

function sameLook(a, b) {
  return a.text === b.text && a.score === b.score && a.prompt === b.prompt && a.parts === b.parts;
}

function updateColumn(column, view) {
  setText(column.title, readable(view.title || ""));
  setText(column.note, readable(view.note || ""));
  column.note.title = view.note || "";
  setText(column.status, readable(view.status || ""));
  column.text.setAttribute("aria-label", (view.title || "Text") + ": tokens; arrow keys move, Enter keeps the card open");
  const box = column.text;
  const streams = column.spans.length > 0;
  const follows = streams && box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  const tokens = view.tokens || [];
  const grew = tokens.length > column.spans.length;
  tokens.forEach((token, index) => {
    let span = column.spans[index];
    if (!span) {
      span = el("span", "token");
      span.tabIndex = index === 0 ? 0 : -1;
      column.spans.push(span);
      box.append(span);
      paintToken(span, token);
    } else if (!sameLook(column.tokens[index], token)) {
      paintToken(span, token);
    }
  });
  while (column.spans.length > tokens.length) column.spans.pop().remove();
  column.tokens = tokens;
  if (grew && follows) box.scrollTop = box.scrollHeight;
}

function draw() {
  const views = JSON.parse(JSON.stringify(props.value || []));
  views.forEach((view, index) => updateColumn(columns[index] || addColumn(), view));
  while (columns.length > views.length) columns.pop().node.remove();
  const scored = views.some((view) => (view.tokens || []).some((token) => typeof token.score === "number"));
  legend.classList.toggle("hidden", !scored);
  if (locked && !tokenAt(locked)) locked = null;
  if (hovered && !tokenAt(hovered)) hovered = null;
  showCard();
}

function tokenAt(place) {
  return columns[place.column]?.tokens[place.index];
}

function spanAt(place) {
  return columns[place.column].spans[place.index];
}

function placeOf(node) {
  const span = node.closest?.(".token");
  if (!span) return null;
  const column = columns.findIndex((each) => each.text.contains(span));
  return column < 0 ? null : { column, index: columns[column].spans.indexOf(span) };
}

function same(a, b) {
  return a && b && a.column === b.column && a.index === b.index;
}

// The token whose card is open: the hovered one, else the locked one.
function showCard() {
  const place = hovered ?? locked;
  root.querySelectorAll(".card-of").forEach((span) => span.classList.remove("card-of"));
  const token = place && tokenAt(place);
  const hasCard = token && (token.details?.length || token.top?.length || token.base_top?.length);
  card.hidden = !hasCard;
  if (!hasCard) return;
  spanAt(place).classList.add("card-of");
  card.replaceChildren(...cardContent(token));
  placeCard(spanAt(place));
}

function cardContent(token) {
  const rows = (token.details || []).map(([label, value]) => {
    return el("tr", null, null, el("th", "muted", label), el("td", "number", value));
  });
  const tops = el("div", "tops");
  if (token.top?.length) tops.append(ranking("This model", token.top, token.text));
  if (token.base_top?.length) tops.append(ranking("Base", token.base_top, token.text));
  return [el("div", "name", visible(token.text)), el("table", null, null, el("tbody", null, null, ...rows)), tops];
}

function ranking(title, top, chosen) {
  const list = el("div", null, null, el("div", "muted", title));
  for (const [text, probability] of top) {
    const bar = el("div", "bar", null, el("span", "mono", shorten(visible(text), 14)));
    bar.append(el("span", "number", (100 * probability).toFixed(1) + " %"));
    bar.classList.toggle("same", text === chosen);
    bar.style.setProperty("--share", 100 * clamp(probability, 0, 1) + "%");
    list.append(bar);
  }
  return list;
}

function placeCard(span) {
  const frame = root.getBoundingClientRect();
  const token = span.getClientRects()[0] || span.getBoundingClientRect();
  const left = clamp(token.left - frame.left, 0, Math.max(0, frame.width - card.offsetWidth));
  const below = token.bottom + card.offsetHeight + 8 < window.innerHeight;
  const top = below ? token.bottom - frame.top + 6 : token.top - frame.top - card.offsetHeight - 6;
  card.style.transform = `translate(${left}px, ${top}px)`;
}

function lock(place) {
  locked = same(locked, place) ? null : place;
  showCard();
}

grid.addEventListener("pointerover", (event) => {
  hovered = placeOf(event.target);
  showCard();
});
grid.addEventListener("pointerleave", () => {
  hovered = null;
  showCard();
});
grid.addEventListener("click", (event) => {
  const place = placeOf(event.target);
  if (!place) return;
  focus(place);
  lock(place);
});
grid.addEventListener("focusin", (event) => {
  hovered = event.target.matches(":focus-visible") ? placeOf(event.target) : hovered;
  showCard();
});
grid.addEventListener("focusout", () => {
  hovered = null;
  showCard();
});
grid.addEventListener("keydown", (event) => {
  const place = placeOf(event.target);
  if (!place) return;
  const last = columns[place.column].spans.length - 1;
  const moves = { ArrowLeft: place.index - 1, ArrowRight: place.index + 1, Home: 0, End: last };
  if (event.key in moves) focus({ column: place.column, index: clamp(moves[event.key], 0, last) });
  else if (event.key === "Enter" || event.key === " ") lock(place);
  else if (event.key === "Escape") {
    locked = hovered = null;
    showCard();
  } else return;
  event.preventDefault();
});

function focus(place) {
  const spans = columns[place.column].spans;
  const before = spans.find((span) => span.tabIndex === 0);
  if (before) before.tabIndex = -1;
  spans[place.index].tabIndex = 0;
  spans[place.index].focus({ preventScroll: false });
}

watch("value", draw);
draw();
