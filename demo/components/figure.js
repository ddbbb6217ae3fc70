// One attention map on a canvas, with token labels and the cell that is pointed at. `board` is what the maps share:
// tokens, start, zoom {row, column, size}, contrast, focus(), colors, and what to call when the pointer moves.

const LABEL = 11; // pixels that a label needs
const SMALLEST_ZOOM = 8;

class MapFigure {
  constructor(map, board) {
    this.map = map;
    this.board = board;
    this.canvas = el("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `${map.title}: attention map. Arrow keys move the kept cell, Escape lets it go, + and − zoom.`);
    this.canvas.dataset.map = map.key;
    this.ramp = el("span", "ramp");
    this.low = el("span", "muted");
    this.high = el("span", "muted");
    const keys = (map.names || []).map((name, index) => {
      const swatch = el("span", "branch");
      swatch.style.setProperty("--branch", `var(--series-${(index + 1) % 7})`);
      return el("span", "key", null, swatch, name);
    });
    const scale = keys.length ? el("div", "scale", null, ...keys) : el("div", "scale", null, this.low, this.ramp, this.high);
    this.node = el("figure", "figure", null, el("h4", null, map.title), el("div", "note muted", map.note), this.canvas, scale);
    this.node.style.margin = 0;
    this.backdrop = document.createElement("canvas");
    this.seen = true;
    this.listen();
    this.paint();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    new IntersectionObserver(([entry]) => {
      this.seen = entry.isIntersecting;
      this.draw();
    }).observe(this.canvas);
  }

  get size() {
    return this.board.tokens.length;
  }

  value(row, column) {
    return column <= row ? this.map.values[triangleIndex(row, column)] : undefined;
  }

  paint() {
    const { map, board } = this;
    this.still = null;
    this.image =
      map.kind === "branches"
        ? paintBranches(map.values, map.branches, this.size, map.largest, board)
        : paintTriangle(map.values, this.size, map.largest, map.kind, board.contrast);
    this.ramp.style.background = `linear-gradient(90deg, ${this.stops().join(", ")})`;
    [this.low.textContent, this.high.textContent] = this.ends();
  }

  // Colours from the smallest to the largest value.
  stops() {
    const colors = rampColors(this.map.kind);
    return [0, 51, 102, 153, 204, 255].map((k) => cssColor(colors[k]));
  }

  // What stands at both ends of the colours.
  ends() {
    const { map } = this;
    const limit = formatNumber(map.largest);
    if (map.kind !== "difference") return ["0", limit];
    return [`${map.lowLabel || "less"} −${limit}`, `+${limit} ${map.highLabel || "more"}`];
  }

  // Where the map lies on the canvas, in CSS pixels.
  layout() {
    const width = this.canvas.clientWidth;
    const gutter = Math.round(clamp(width * 0.17, 46, 84));
    return { width, gutter, side: width - gutter - 1, cell: (width - gutter - 1) / this.board.zoom.size };
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const { gutter, cell } = this.layout();
    const { zoom } = this.board;
    const row = Math.floor((event.clientY - box.top - gutter) / cell);
    const column = Math.floor((event.clientX - box.left - gutter) / cell);
    if (row < 0 || column < 0 || row >= zoom.size || column >= zoom.size) return null;
    return { row: row + zoom.row, column: column + zoom.column };
  }

  // Draws what hovering changes over what it does not.
  draw() {
    const { width, gutter, side, cell } = this.layout();
    if (width < 60 || !this.seen) return; // in a tab that is not open, or scrolled away
    const density = window.devicePixelRatio || 1;
    const pixels = Math.round(width * density);
    const { zoom } = this.board;
    const still = [pixels, zoom.row, zoom.column, zoom.size].join();
    if (still !== this.still) {
      this.still = still;
      this.canvas.width = this.canvas.height = this.backdrop.width = this.backdrop.height = pixels;
      this.drawBackdrop(density, width, gutter, side, cell);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, pixels, pixels);
    context.drawImage(this.backdrop, 0, 0);
    const focus = this.board.focus();
    if (!focus) return;
    context.setTransform(density, 0, 0, density, 0, 0);
    this.drawFocus(context, gutter, side, cell, focus);
  }

  drawBackdrop(density, width, gutter, side, cell) {
    const context = this.backdrop.getContext("2d");
    const { zoom, labels, colors } = this.board;
    context.setTransform(density, 0, 0, density, 0, 0);
    context.clearRect(0, 0, width, width);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, zoom.column, zoom.row, zoom.size, zoom.size, gutter, gutter, side, side);
    context.strokeStyle = colors.muted;
    context.strokeRect(gutter - 0.5, gutter - 0.5, side + 1, side + 1);
    const every = Math.ceil(LABEL / cell);
    for (let k = 0; k < zoom.size; k++) {
      const place = gutter + (k + 0.5) * cell;
      if ((zoom.row + k) % every === 0) this.drawLabel(context, labels[zoom.row + k], gutter - 5, place, 0, gutter);
      if ((zoom.column + k) % every === 0) this.drawLabel(context, labels[zoom.column + k], place, gutter - 5, Math.PI / 2, gutter);
    }
  }

  // A label that ends at (x, y); turned by a quarter it ends at the bottom. The chosen one covers its neighbours.
  drawLabel(context, text, x, y, turn, gutter, chosen = false) {
    const { colors, font } = this.board;
    context.save();
    context.translate(x, y);
    context.rotate(turn);
    if (chosen) {
      context.fillStyle = colors.panel;
      context.fillRect(7 - gutter, -LABEL, gutter - 7, 2 * LABEL);
    }
    context.font = `${chosen ? "bold " : ""}${LABEL}px ${font}`;
    context.fillStyle = chosen ? colors.ink : colors.muted;
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillText(text, 0, 0, gutter - 7);
    context.restore();
  }

  drawFocus(context, gutter, side, cell, focus) {
    const { zoom, colors } = this.board;
    const y = gutter + (focus.row - zoom.row) * cell;
    const x = gutter + (focus.column - zoom.column) * cell;
    const rowSeen = focus.row >= zoom.row && focus.row < zoom.row + zoom.size;
    const columnSeen = focus.column >= zoom.column && focus.column < zoom.column + zoom.size;
    const thick = Math.max(cell, 1.5);
    context.save();
    context.fillStyle = colors.ink;
    context.globalAlpha = 0.14;
    if (rowSeen) context.fillRect(gutter, y, side, thick);
    if (columnSeen) context.fillRect(x, gutter, thick, side);
    context.restore();
    const { labels } = this.board;
    if (rowSeen) this.drawLabel(context, labels[focus.row], gutter - 5, y + cell / 2, 0, gutter, true);
    if (columnSeen) this.drawLabel(context, labels[focus.column], x + cell / 2, gutter - 5, Math.PI / 2, gutter, true);
    if (!rowSeen || !columnSeen) return;
    const pad = Math.max(0, (7 - cell) / 2);
    for (const [color, thickness] of [[colors.panel, 5], [colors.ink, 2]]) {
      context.strokeStyle = color;
      context.lineWidth = thickness;
      context.strokeRect(x - pad, y - pad, cell + 2 * pad, cell + 2 * pad);
    }
    context.lineWidth = 1;
  }

  listen() {
    const { canvas, board } = this;
    let drag = null;
    canvas.addEventListener("pointerdown", (event) => {
      drag = event.pointerType === "mouse" ? { x: event.clientX, y: event.clientY, zoom: { ...board.zoom }, moved: false } : null;
    });
    canvas.addEventListener("pointermove", (event) => {
      if (drag && event.buttons === 1 && board.zoom.size < this.size) {
        const { cell } = this.layout();
        const columns = Math.round((drag.x - event.clientX) / cell);
        const rows = Math.round((drag.y - event.clientY) / cell);
        drag.moved ||= Math.hypot(drag.x - event.clientX, drag.y - event.clientY) > 4;
        if (drag.moved) board.scrollTo(drag.zoom.row + rows, drag.zoom.column + columns);
      }
      board.hover(this.cellAt(event), this, event);
    });
    canvas.addEventListener("pointerleave", () => board.hover(null));
    canvas.addEventListener("click", (event) => {
      if (!drag?.moved) board.toggle(this.cellAt(event));
      drag = null;
    });
    canvas.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey) return;
        event.preventDefault();
        board.zoomBy(event.deltaY < 0 ? 1.25 : 0.8, this.cellAt(event));
      },
      { passive: false },
    );
    canvas.addEventListener("keydown", (event) => {
      if (board.key(event.key, this)) event.preventDefault();
    });
  }
}
