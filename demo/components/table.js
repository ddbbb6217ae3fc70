// A table of texts; see table.py.
const root = element.querySelector(".view");

function cells(tag, scope, texts) {
  return texts.map((text) => {
    const cell = el(tag, null, readable(text));
    if (scope) cell.scope = scope;
    return cell;
  });
}

function draw() {
  const { headers = [], rows = [] } = props.value || {};
  const head = el("thead", null, null, el("tr", null, null, ...cells("th", "col", headers)));
  const lines = rows.map(([name, ...rest]) => {
    const line = el("tr", null, null, ...cells("th", "row", [name]), ...cells("td", null, rest));
    [...line.children].forEach((cell, index) => (cell.dataset.label = readable(headers[index] || "")));
    return line;
  });
  root.replaceChildren(el("div", "scroll", null, el("table", "texts", null, head, el("tbody", null, null, ...lines))));
}

watch("value", draw);
draw();
