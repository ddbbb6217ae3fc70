// Charts in a grid; see curves.py.
const root = element.querySelector(".view");
const grid = el("div", "charts");
const empty = el("div", "empty", options.empty);
empty.style.minHeight = options.room + "px";
root.append(grid, empty);

let drawn = null;

function draw() {
  const value = JSON.stringify(props.value || []);
  if (value === drawn) return; // it may come again with every frame of a run
  drawn = value;
  const specs = JSON.parse(value);
  grid.replaceChildren(...specs.map((spec) => lineChart(spec).node));
  grid.hidden = !specs.length;
  empty.hidden = specs.length > 0;
}

watch("value", draw);
draw();
