// Thumbnails of all layers and heads; see heads.py.
const root = element.querySelector(".view");
const grid = el("div", "heads");
const caption = el("div", "caption muted");
const empty = el("div", "empty", options.empty);
const scroller = el("div", "scroller", null, grid);
const orders = el("select");
const finder = el("label", "finder muted", "Heads in order of", orders);
root.append(finder, scroller, caption, empty);
grid.setAttribute("role", "radiogroup");
grid.setAttribute("aria-label", "Layer and head; arrow keys move, Enter opens");

let view = null;
let buttons = []; // by place: layer after layer
let order = "place";

function thumbnail(bytes, size) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const pixels = new Uint32Array(image.data.buffer);
  const colors = rampColors("share");
  for (let k = 0; k < pixels.length; k++) if (k % size <= k / size) pixels[k] = colors[bytes[k]];
  context.putImageData(image, 0, 0);
  return canvas;
}

function measure(key) {
  return view.measures?.find((each) => each.key === key);
}

function said(found, layer, head) {
  const value = found.values[layer][head];
  return found.share ? `${(100 * value).toFixed(0)} %` : value.toFixed(2);
}

function describe(layer, head) {
  const found = measure(order) ?? measure("distance");
  return `Layer ${layer}, head ${head}${found ? `: ${said(found, layer, head)} ${found.note}` : ""}`;
}

// Buttons stay while the grid keeps its size: focus and a click on its way are not lost when other maps come.
function build() {
  const before = view && [view.layers, view.heads].join();
  view = props.value ? JSON.parse(JSON.stringify(props.value)) : null;
  draw(before);
}

// Draws what there is again, the open head as it is; `before`: the size of the grid that stands.
function draw(before = view && [view.layers, view.heads].join()) {
  empty.hidden = view !== null;
  finder.hidden = scroller.hidden = caption.hidden = view === null;
  if (!view) return;
  buildOrders();
  if (before !== [view.layers, view.heads].join()) buttons = [];
  buildGrid();
  const bytes = decodeBytes(view.pixels);
  const area = view.size * view.size;
  buttons.forEach((button, index) => {
    const [layer, head] = [Math.floor(index / view.heads), index % view.heads];
    const distance = view.distance?.[layer]?.[head];
    const bar = el("span", "distance");
    bar.style.setProperty("--distance", 100 * clamp(distance ?? 0, 0, 1) + "%");
    const found = measure(order);
    const label = found ? [el("span", "axis", `${layer}.${head} · ${said(found, layer, head)}`)] : [];
    button.replaceChildren(thumbnail(bytes.subarray(index * area, (index + 1) * area), view.size), bar, ...label);
    button.setAttribute("aria-label", describe(layer, head));
  });
  select(view.layer, view.head);
}

function buildOrders() {
  const choices = [["place", "layer and head"], ...(view.measures || []).map(({ key, name }) => [key, name])];
  if (!choices.some(([key]) => key === order)) order = "place";
  orders.replaceChildren(...choices.map(([key, name]) => {
    const option = el("option", null, name);
    option.value = key;
    option.selected = key === order;
    return option;
  }));
}

// Indices of the buttons as they are shown.
function shownOrder() {
  const places = buttons.map((_, index) => index);
  const found = measure(order);
  if (!found) return places;
  const sign = found.order === "least" ? 1 : -1;
  const value = (index) => found.values[Math.floor(index / view.heads)][index % view.heads];
  return places.sort((a, b) => sign * (value(a) - value(b)) || a - b);
}

function buildGrid() {
  while (buttons.length < view.layers * view.heads) {
    const button = el("button", "head");
    button.type = "button";
    button.setAttribute("role", "radio");
    button.dataset.index = buttons.length;
    buttons.push(button);
  }
  grid.style.setProperty("--heads", view.heads);
  grid.classList.toggle("found", order !== "place");
  const nodes = order === "place" ? placed() : shownOrder().map((index) => buttons[index]);
  if (nodes.length !== grid.children.length || nodes.some((node, k) => node !== grid.children[k])) grid.replaceChildren(...nodes);
}

let axes = [];

// Buttons between the numbers of layers and heads.
function placed() {
  if (axes.length !== 1 + view.heads + view.layers) {
    const heads = Array.from({ length: view.heads }, (_, head) => el("span", "axis", head === 0 ? "head 0" : head));
    const layers = Array.from({ length: view.layers }, (_, layer) => el("span", "axis row", layer === 0 ? "layer 0" : layer));
    axes = [el("span"), ...heads, ...layers];
  }
  const lines = Array.from({ length: view.layers }, (_, layer) => [
    axes[1 + view.heads + layer],
    ...buttons.slice(layer * view.heads, (layer + 1) * view.heads),
  ]);
  return [...axes.slice(0, 1 + view.heads), ...lines.flat()];
}

function select(layer, head) {
  view.layer = clamp(layer, 0, view.layers - 1);
  view.head = clamp(head, 0, view.heads - 1);
  const chosen = view.layer * view.heads + view.head;
  buttons.forEach((button, index) => {
    button.setAttribute("aria-checked", String(index === chosen));
    button.tabIndex = index === chosen ? 0 : -1;
  });
  say(view.layer, view.head);
}

function say(layer, head) {
  const bar = view.distance ? " Orange bar: how far the head is from the base's." : "";
  caption.textContent = describe(layer, head) + "." + bar;
}

function open(index) {
  select(Math.floor(index / view.heads), index % view.heads);
  trigger("select", { layer: view.layer, head: view.head });
}

function indexOf(event) {
  const button = event.target.closest(".head");
  return button ? Number(button.dataset.index) : null;
}

grid.addEventListener("click", (event) => {
  const index = indexOf(event);
  if (index !== null) open(index);
});
grid.addEventListener("pointerover", (event) => {
  const index = indexOf(event);
  if (index !== null) say(Math.floor(index / view.heads), index % view.heads);
});
grid.addEventListener("pointerleave", () => view && say(view.layer, view.head));
grid.addEventListener("keydown", (event) => {
  const index = indexOf(event);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -view?.heads, ArrowDown: view?.heads }[event.key];
  if (index === null || step === undefined) return;
  event.preventDefault();
  const shown = shownOrder();
  const next = shown[shown.indexOf(index) + step];
  if (next === undefined) return;
  buttons[index].tabIndex = -1;
  buttons[next].tabIndex = 0;
  buttons[next].focus();
  say(Math.floor(next / view.heads), next % view.heads);
});

orders.addEventListener("change", () => {
  order = orders.value;
  draw();
});
onTheme(() => draw());
watch("value", build);
build();
