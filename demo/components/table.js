// A table of texts; see table.py.
const root = element.querySelector(".view");

const LONG = 40; // characters of a last column that is text and not one more figure
const PHONE = 600; // pixels
const TABLET = 1000;
let grid = null;

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
  const wordy = rows.some((row) => String(row.at(-1)).length > LONG);
  grid = el("table", wordy ? "texts wordy" : "texts", null, head, el("tbody", null, null, ...lines));
  const table = el("div", "scroll", null, grid);
  // One head alone says why there are no rows.
  const why = !rows.length && headers.length === 1 ? [el("div", "muted", readable(headers[0]))] : [];
  root.replaceChildren(...why, ...(rows.length ? [table] : []), ...(rows.length && options.file ? [csvButton(headers, rows)] : []));
  fit();
}

// Rows become lists where there is little room, and also on a tablet where the table is too wide for it.
function fit() {
  const width = root.clientWidth;
  if (!width || !grid) return; // in a tab that is not open
  grid.classList.remove("listed");
  grid.classList.toggle("listed", width < PHONE || (width < TABLET && grid.scrollWidth > width));
}

function csvButton(headers, rows) {
  const button = el("button", "csv", "CSV");
  button.type = "button";
  button.title = "Download the table as comma-separated values";
  button.addEventListener("click", () => {
    // A cell that a spreadsheet would take for a formula is text.
    const quoted = (cell) => `"${String(cell).replace(/^(?=[=+\-@\t\r])(?!-?[\d.]+$)/, "'").replace(/"/g, '""')}"`;
    const lines = [headers, ...rows].map((row) => row.map(quoted).join(",") + "\r\n");
    const link = el("a");
    link.href = URL.createObjectURL(new Blob(["\ufeff", ...lines], { type: "text/csv" }));
    link.download = `${options.file}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  });
  return button;
}

new ResizeObserver(throttled(fit)).observe(root);
watch("value", draw);
draw();
