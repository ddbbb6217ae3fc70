// Charts in a grid; see curves.py.
const root = element.querySelector(".view");
const grid = el("div", "charts");
const empty = el("div", "empty", options.empty);
empty.style.minHeight = options.room + "px";
root.append(grid, empty);

function draw() {
  const specs = JSON.parse(JSON.stringify(props.value || []));
  grid.replaceChildren(...specs.map((spec) => lineChart(spec).node));
  grid.hidden = !specs.length;
  empty.hidden = specs.length > 0;
}

watch("value", draw);
draw();
