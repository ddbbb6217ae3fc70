// A table of costs; see costs.py.
const root = element.querySelector(".view");

function headerCell([label, explanation]) {
  const cell = el("th", null, null, el("div", null, label));
  cell.scope = "col";
  if (explanation) cell.append(el("div", "muted small", explanation));
  return cell;
}

function numberCell(number, reference, [label, explanation] = [""]) {
  const cell = el("td", "number", formatNumber(number));
  cell.dataset.label = label; // shown where there is no room for a head
  cell.title = explanation || "";
  const comparable = typeof number === "number" && typeof reference === "number" && reference > 0;
  cell.append(el("span", "ratio muted small", comparable ? formatRatio(number / reference) : ""));
  return cell;
}

function formatRatio(ratio) {
  return (ratio >= 10 ? Math.round(ratio) : ratio.toFixed(ratio < 0.995 ? 2 : 1)) + "×";
}

let drawn = null;

function draw() {
  const value = JSON.stringify(props.value);
  if (value === drawn) return; // it comes again with every frame of a run
  drawn = value;
  const { headers = [], rows = [], reference = null, measured = "" } = props.value || {};
  const head = el("thead", null, null, el("tr", null, null, ...headers.map(headerCell)));
  const body = el("tbody");
  rows.forEach(([name, ...numbers], index) => {
    const first = el("th", null, name);
    first.scope = "row";
    const base = reference === null || reference === index ? [] : rows[reference].slice(1);
    body.append(el("tr", null, null, first, ...numbers.map((number, i) => numberCell(number, base[i], headers[i + 1]))));
  });
  const table = el("div", "scroll", null, el("table", "costs", null, head, body));
  const where = measured ? [el("div", "measured small", readable(measured))] : [];
  root.replaceChildren(table, ...where, el("div", "muted small", options.note));
}

watch("value", draw);
draw();
