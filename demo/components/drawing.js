// Attention maps as one SVG drawing, with labels, colour bars and the text: for a paper, or to be painted as a picture.

const DRAWN = 300; // pixels of a map's side
const DRAWN_GUTTER = 74;
const LINE = 19;
const CHARACTER = 7.3; // width of a monospaced letter of 12 pixels

// `figures` are MapFigures, `sentences` stand above them, `tokens` are [{text, share, chosen}]. Returns {text, width, height}.
function drawMaps(figures, board, title, sentences, tokens) {
  const { ink, muted, panel } = board.colors;
  const columns = Math.min(3, figures.length);
  const cell = DRAWN + DRAWN_GUTTER + 26;
  const width = Math.max(columns * cell + 24, 480);
  const root = svg("svg", { width, "font-family": "sans-serif", "font-size": 12, fill: ink });
  root.setAttribute("xmlns", SVG);
  const ground = root.appendChild(svg("rect", { width: "100%", fill: panel }));
  root.append(svg("text", { x: 12, y: 24, "font-size": 16, "font-weight": "bold" }, readable(title)));
  let y = 44;
  for (const line of sentences.flatMap((sentence) => wrapped(readable(sentence), Math.floor((width - 24) / 6.2)))) {
    root.append(svg("text", { x: 12, y }, line));
    y += 17;
  }
  const height = DRAWN + DRAWN_GUTTER + 62;
  figures.forEach((figure, index) => {
    const group = svg("g", { transform: `translate(${12 + (index % columns) * cell} ${y + Math.floor(index / columns) * height})` });
    group.append(...drawFigure(figure, board, muted, index));
    root.append(group);
  });
  y += Math.ceil(figures.length / columns) * height;
  y = drawTokens(root, tokens, board, y + 6, width);
  root.setAttribute("height", y + 12);
  root.setAttribute("viewBox", `0 0 ${width} ${y + 12}`);
  ground.setAttribute("height", y + 12);
  return { text: new XMLSerializer().serializeToString(root), width, height: y + 12 };
}

function wrapped(text, most) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1) && (lines.at(-1) + " " + word).length > most) lines.push("");
    lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
  }
  return lines;
}

function drawFigure(figure, board, muted, index) {
  const { zoom, labels } = board;
  const top = 22 + DRAWN_GUTTER;
  const image = document.createElement("canvas");
  image.width = image.height = zoom.size;
  image.getContext("2d").drawImage(figure.image, zoom.column, zoom.row, zoom.size, zoom.size, 0, 0, zoom.size, zoom.size);
  const place = { x: DRAWN_GUTTER, y: top, width: DRAWN, height: DRAWN };
  const nodes = [
    svg("text", { x: 0, y: 14, "font-weight": "bold" }, readable(figure.map.title)),
    svg("image", { ...place, href: image.toDataURL("image/png"), style: "image-rendering: pixelated", preserveAspectRatio: "none" }),
    svg("rect", { ...place, fill: "none", stroke: muted }),
  ];
  const cell = DRAWN / zoom.size;
  const every = Math.ceil(LABEL / cell);
  const text = { "font-family": "monospace", "font-size": 10, fill: muted, "text-anchor": "end" };
  for (let k = 0; k < zoom.size; k++) {
    const at = (k + 0.5) * cell;
    if ((zoom.row + k) % every === 0) nodes.push(svg("text", { ...text, x: DRAWN_GUTTER - 5, y: top + at + 3 }, labels[zoom.row + k]));
    const turned = `translate(${DRAWN_GUTTER + at + 3} ${top - 5}) rotate(90)`;
    if ((zoom.column + k) % every === 0) nodes.push(svg("text", { ...text, transform: turned }, labels[zoom.column + k]));
  }
  return [...nodes, ...drawScale(figure, board, muted, index, top + DRAWN + 10)];
}

function drawScale(figure, board, muted, index, y) {
  const small = { "font-size": 11, fill: muted };
  if (figure.map.names) {
    let x = DRAWN_GUTTER;
    return figure.map.names.flatMap((name, k) => {
      const color = `rgb(${board.branchColors[k % board.branchColors.length].join(" ")})`;
      const nodes = [svg("rect", { x, y, width: 10, height: 10, fill: color }), svg("text", { ...small, x: x + 14, y: y + 9 }, name)];
      x += 26 + 6 * name.length;
      return nodes;
    });
  }
  const id = `ramp-${index}`;
  const gradient = svg("linearGradient", { id });
  const stops = figure.stops();
  stops.forEach((color, k) => gradient.append(svg("stop", { offset: k / (stops.length - 1), "stop-color": color })));
  const [low, high] = figure.ends();
  return [
    gradient,
    svg("rect", { x: DRAWN_GUTTER, y, width: DRAWN, height: 9, fill: `url(#${id})`, stroke: muted, "stroke-width": 0.5 }),
    svg("text", { ...small, x: DRAWN_GUTTER, y: y + 22 }, readable(low)),
    svg("text", { ...small, x: DRAWN_GUTTER + DRAWN, y: y + 22, "text-anchor": "end" }, readable(high)),
  ];
}

function drawTokens(root, tokens, board, y, width) {
  let x = 12;
  const blue = `rgb(${board.branchColors[0].join(" ")})`;
  for (const { text, share, chosen } of tokens) {
    const shown = text.replace(/\n/g, "↵");
    const wide = CHARACTER * Array.from(shown).length;
    if (x + wide > width - 12) [x, y] = [12, y + LINE];
    const box = { x, y, width: wide, height: LINE - 2 };
    root.append(svg("rect", { ...box, fill: blue, "fill-opacity": (0.65 * share).toFixed(3), ...(chosen ? { stroke: board.colors.ink } : {}) }));
    root.append(svg("text", { x, y: y + 13, "font-family": "monospace", textLength: wide, lengthAdjust: "spacingAndGlyphs", "xml:space": "preserve" }, shown));
    x += wide;
  }
  return y + LINE;
}
