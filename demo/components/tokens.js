// Columns of tokens; see tokens.py.
const root = element.querySelector(".view");
const grid = el("div", "columns");
const card = el("div", "card");
const live = el("div", "unseen");
const hitMark = el("span", null, null, el("span", "hit", "name"), " " + options.hit);
const legend = buildLegend();
root.append(grid, legend, card, live);
card.hidden = true;
live.setAttribute("role", "status");

const TAIL = 90; // characters of a prompt that stay when it is folded

const columns = [];
let hovered = null; // {column, index}
let locked = null;
let inCard = null; // the token that the card is of
let unfolded = false;

function buildLegend() {
  const ticks = el("span", "ticks", null, ...(options.ticks || []).map((tick) => el("span", null, tick)));
  const scale = el("span", "scale", null, el("span", "ramp"), ticks);
  const mark = options.mark ? [el("span", null, null, el("span", "difference", "≠"), " " + options.mark)] : [];
  return el("div", "legend muted hidden", null, el("span", null, options.legend), scale, ...mark, hitMark);
}

function addColumn() {
  const column = {
    node: el("section", "column"),
    title: el("h3"),
    note: el("div", "note muted"),
    text: el("div", "text"),
    fold: el("button", "fold"),
    prompt: el("span", "prompt"),
    status: el("div", "status muted"),
    view: {},
    lines: "",
    tokens: [],
    spans: [],
    follows: false,
  };
  column.text.setAttribute("role", "group");
  column.text.dir = "ltr";
  column.text.append(column.fold, column.prompt);
  column.fold.addEventListener("click", () => {
    unfolded = !unfolded;
    columns.forEach(showPrompt);
  });
  column.text.addEventListener("scroll", () => {
    const box = column.text;
    column.follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  });
  column.node.append(column.title, column.note, column.text, column.status);
  grid.append(column.node);
  columns.push(column);
  return column;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// A long prompt is folded to its last lines, from the beginning of a word on.
function showPrompt(column) {
  const prompt = column.view.prompt || "";
  const start = prompt.length > 1.5 * TAIL ? prompt.indexOf(" ", prompt.length - TAIL) : -1;
  const folds = start > 0;
  column.fold.hidden = !folds;
  setText(column.fold, unfolded ? "Fold the prompt" : "… " + (column.view.prompt_tokens || 0).toLocaleString("en") + " tokens");
  column.fold.setAttribute("aria-expanded", String(unfolded));
  column.fold.title = unfolded ? "" : "Show the whole prompt";
  setText(column.prompt, readable(folds && !unfolded ? prompt.slice(start) : prompt));
}

function paintToken(span, token) {
  span.className = "token";
  span.classList.toggle("parts", Boolean(token.parts));
  span.classList.toggle("hit", Boolean(token.hit));
  const scored = token.score !== null && token.score !== undefined;
  span.classList.toggle("scored", scored);
  if (scored) span.style.setProperty("--score", clamp(token.score, 0, 1));
  span.replaceChildren();
  for (const piece of readable(token.text).split(/(\n)/)) {
    if (piece === "\n") span.append(el("span", "return", "↵"));
    span.append(piece);
  }
}

function sameLook(a, b) {
  return a.text === b.text && a.score === b.score && a.parts === b.parts && a.hit === b.hit;
}

function parse(lines) {
  return lines ? lines.slice(0, -1).split("\n").map((line) => JSON.parse(line)) : [];
}

// Tokens that are new are added; those that look otherwise than before are painted anew.
function updateTokens(column, lines) {
  if (lines === column.lines) return;
  const grown = lines.startsWith(column.lines);
  const kept = grown ? column.tokens : [];
  const tokens = kept.concat(parse(grown ? lines.slice(column.lines.length) : lines));
  const added = document.createDocumentFragment();
  for (let index = kept.length; index < tokens.length; index++) {
    let span = column.spans[index];
    if (!span) {
      span = el("span", "token");
      span.tabIndex = index === 0 ? 0 : -1;
      column.spans.push(span);
      added.append(span);
    } else if (sameLook(column.tokens[index], tokens[index])) continue;
    paintToken(span, tokens[index]);
  }
  column.text.append(added);
  while (column.spans.length > tokens.length) column.spans.pop().remove();
  column.tokens = tokens;
  column.lines = lines;
}

function updateColumn(column, view) {
  const lines = view.lines || "";
  if (view.busy && !lines) column.follows = true;
  setText(column.title, readable(view.title || ""));
  setText(column.note, readable(view.note || ""));
  column.note.title = view.note || "";
  setText(column.status, readable(view.status || ""));
  const how = options.takes ? "; Enter keeps the card open, then ArrowDown chooses another token" : "; Enter keeps the card open";
  const label = readable(view.title || "Text") + ": tokens; arrow keys move" + how;
  if (column.text.getAttribute("aria-label") !== label) column.text.setAttribute("aria-label", label);
  const changed = view.prompt !== column.view.prompt || view.prompt_tokens !== column.view.prompt_tokens;
  column.view = view;
  if (changed || !lines) showPrompt(column);
  const follows = column.follows;
  updateTokens(column, lines);
  if (follows && view.busy) column.text.scrollTop = column.text.scrollHeight;
}

let busy = false;

function draw() {
  const views = JSON.parse(JSON.stringify(props.value || []));
  views.forEach((view, index) => updateColumn(columns[index] || addColumn(), view));
  while (columns.length > views.length) columns.pop().node.remove();
  const scored = columns.some((column) => column.tokens.some((token) => typeof token.score === "number"));
  legend.classList.toggle("hidden", !scored);
  hitMark.hidden = !columns.some((column) => column.tokens.some((token) => token.hit));
  if (locked && !tokenAt(locked)) locked = null;
  if (hovered && !tokenAt(hovered)) hovered = null;
  showCard();
  announce(columns.some((column) => column.view.busy));
}

// Says that a run has ended to those who do not see it.
function announce(isBusy) {
  if (busy === isBusy) return;
  busy = isBusy;
  const said = columns.map((column) => column.title.textContent + ": " + column.status.textContent);
  setText(live, busy ? "" : "The run has ended. " + said.join("; "));
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
  const kept = same(place, locked);
  if (inCard !== token || card.classList.contains("kept") !== kept) {
    inCard = token; // drawn once, or a button would be gone before it is pressed
    card.classList.toggle("kept", kept);
    card.replaceChildren(...cardContent(token, kept && options.takes ? place : null));
  }
  placeCard(spanAt(place));
}

function cardContent(token, place) {
  const rows = (token.details || []).map(([label, value]) => {
    return el("tr", null, null, el("th", "muted", label), el("td", "number", value));
  });
  const tops = el("div", "tops");
  if (token.top?.length) tops.append(ranking("This model", token, token.top, place, false));
  if (token.base_top?.length) tops.append(ranking("Base", token, token.base_top, place, true));
  const hint = place ? [el("div", "muted hint", "Choose a token to go on from there.")] : [];
  const table = el("table", null, null, el("tbody", null, null, ...rows));
  return [el("div", "name", visible(token.text)), table, tops, ...hint];
}

// The most probable tokens; where `place` is given each is a button that takes it in place of the one written.
function ranking(title, token, top, place, ofBase) {
  const chosen = token.text;
  const list = el("div", null, null, el("div", "muted", title));
  for (const [rank, [text, probability]] of top.entries()) {
    const bar = el(place ? "button" : "div", "bar", null, el("span", "mono", shorten(visible(text), 14)));
    if (place) {
      bar.title = "Take " + visible(text) + " and go on from there";
      bar.addEventListener("click", () => trigger("select", { ...place, of_base: ofBase, rank }));
    }
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
  const top = below ? token.bottom - frame.top + 3 : token.top - frame.top - card.offsetHeight - 3;
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
  else if (event.key === "ArrowDown" && same(place, locked)) card.querySelector("button")?.focus();
  else if (event.key === "Escape") {
    locked = hovered = null;
    showCard();
  } else return;
  event.preventDefault();
});

card.addEventListener("keydown", (event) => {
  const buttons = [...card.querySelectorAll("button")];
  const at = buttons.indexOf(event.target);
  const moves = { ArrowDown: at + 1, ArrowUp: at - 1 };
  if (event.key === "Escape" && locked) focus(locked);
  else if (event.key in moves) buttons[clamp(moves[event.key], 0, buttons.length - 1)]?.focus();
  else return;
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
