// Thumbnails of all layers and heads; see heads.py.
const root = element.querySelector(".view");
const grid = el("div", "heads");
const caption = el("div", "caption muted");
const empty = el("div", "empty", props.empty);
const scroller = el("div", "scroller", null, grid);
root.append(scroller, caption, empty);
grid.setAttribute("role", "radiogroup");
grid.setAttribute("aria-label", "Layer and head; arrow keys move, Enter opens");

let view = null;
let buttons = [];

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

function describe(layer, head) {
  const distance = view.distance?.[layer]?.[head];
  const differs = distance === undefined || distance === null ? "" : `: ${(100 * distance).toFixed(0)} % of the attention lies elsewhere than the base's`;
  return `Layer ${layer}, head ${head}${differs}`;
}

// Buttons stay while the grid keeps its size: focus and a click on its way are not lost when other maps come.
function build() {
  const before = view && [view.layers, view.heads].join();
  view = props.value ? JSON.parse(JSON.stringify(props.value)) : null;
  empty.hidden = view !== null;
  scroller.hidden = caption.hidden = view === null;
  if (!view) return;
  if (before !== [view.layers, view.heads].join()) buildGrid();
  const bytes = decodeBytes(view.pixels);
  const area = view.size * view.size;
  buttons.forEach((button, index) => {
    const [layer, head] = [Math.floor(index / view.heads), index % view.heads];
    const distance = view.distance?.[layer]?.[head];
    const bar = el("span", "distance");
    bar.style.setProperty("--distance", 100 * clamp(distance ?? 0, 0, 1) + "%");
    button.replaceChildren(thumbnail(bytes.subarray(index * area, (index + 1) * area), view.size), bar);
    button.setAttribute("aria-label", describe(layer, head));
  });
  select(view.layer, view.head);
}

function buildGrid() {
  buttons = [];
  grid.replaceChildren(el("span"));
  grid.style.setProperty("--heads", view.heads);
  for (let head = 0; head < view.heads; head++) grid.append(el("span", "axis", head === 0 ? "head 0" : head));
  for (let layer = 0; layer < view.layers; layer++) {
    grid.append(el("span", "axis row", layer === 0 ? "layer 0" : layer));
    for (let head = 0; head < view.heads; head++) {
      const button = el("button", "head");
      button.type = "button";
      button.setAttribute("role", "radio");
      button.dataset.index = buttons.length;
      buttons.push(button);
      grid.append(button);
    }
  }
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
  const next = index + step;
  if (next < 0 || next >= buttons.length) return;
  buttons[index].tabIndex = -1;
  buttons[next].tabIndex = 0;
  buttons[next].focus();
  say(Math.floor(next / view.heads), next % view.heads);
});

onTheme(build);
watch("value", build);
build();
