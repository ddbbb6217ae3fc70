// Heat maps: decoding, colours, drawing.

// Bytes of base64 text.
function decodeBytes(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let k = 0; k < binary.length; k++) bytes[k] = binary.charCodeAt(k);
  return bytes;
}

// The value of every float16, by its bits; made once.
const HALVES = (() => {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const size =
      exponent === 31
        ? fraction ? NaN : Infinity
        : exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
    table[bits] = bits & 32768 ? -size : size;
  }
  return table;
})();

// Base64 of little-endian float16 as Float32Array.
function decodeHalves(text) {
  const bytes = decodeBytes(text);
  const values = new Float32Array(bytes.length >> 1);
  for (let k = 0; k < values.length; k++) values[k] = HALVES[bytes[2 * k] | (bytes[2 * k + 1] << 8)];
  return values;
}

// Where row i, column j ≤ i of a lower triangle lies when its rows follow one another.
function triangleIndex(i, j) {
  return (i * (i + 1)) / 2 + j;
}

// Colours from low to high. Shares: one hue that darkens (light page) or brightens (dark page) in even steps. Differences:
// blue to orange through the page's own grey; both are told apart with every common colour vision.
const RAMPS = {
  share: {
    light: ["#f4f7fb", "#cfe0f0", "#94c2e0", "#4e9aca", "#1f6cab", "#0a4382", "#061f45"],
    dark: ["#161b26", "#173a5e", "#1c6390", "#2b8fb3", "#5bbcc0", "#a9e0c4", "#f7fbd9"],
  },
  difference: {
    light: ["#7a2e00", "#c75a0a", "#f2b27a", "#f3f3f3", "#9cc0e4", "#2f76b8", "#07376e"],
    dark: ["#ffd9b0", "#f2933a", "#9a4d10", "#20242c", "#1d5a97", "#4f9fe0", "#cfe6ff"],
  },
};

function rampColors(kind) {
  const stops = RAMPS[kind === "difference" ? "difference" : "share"][isDark() ? "dark" : "light"];
  const channels = stops.map((stop) => [1, 3, 5].map((k) => parseInt(stop.slice(k, k + 2), 16)));
  const table = new Uint32Array(256);
  for (let k = 0; k < 256; k++) {
    const place = (k / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    const [r, g, b] = [0, 1, 2].map((c) => Math.round(channels[low][c] + (place - low) * (channels[low + 1][c] - channels[low][c])));
    table[k] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return table;
}

function cssColor(packed) {
  return `rgb(${packed & 255} ${(packed >> 8) & 255} ${(packed >> 16) & 255})`;
}

// How a share in [0, 1] of the largest value becomes a place on the ramp.
const CONTRASTS = {
  linear: (share) => share,
  root: Math.sqrt,
  log: (share) => (share <= 1e-4 ? 0 : 1 + Math.log10(share) / 4),
};

// Paints a lower triangle into an offscreen canvas of one pixel a cell; what is above stays transparent.
function paintTriangle(values, size, largest, kind, contrast) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.max(size, 1);
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  const colors = rampColors(kind);
  const place = CONTRASTS[contrast];
  const signed = kind === "difference";
  const scale = largest > 0 ? 1 / largest : 0;
  for (let i = 0, k = 0; i < size; i++) {
    for (let j = 0; j <= i; j++, k++) {
      const share = clamp(Math.abs(values[k]) * scale, 0, 1);
      const level = place(share);
      const at = signed ? (values[k] < 0 ? 127.5 - 127.5 * level : 127.5 + 127.5 * level) : 255 * level;
      pixels[i * size + j] = colors[Math.round(at) || 0];
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// The same with a colour for each branch, as strong as the value; `branches` has the branch of every cell.
function paintBranches(values, branches, size, largest, board) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.max(size, 1);
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const place = CONTRASTS[board.contrast];
  const scale = largest > 0 ? 1 / largest : 0;
  const ground = cssColor(rampColors("share")[0]).match(/\d+/g).map(Number);
  for (let i = 0, k = 0; i < size; i++) {
    for (let j = 0; j <= i; j++, k++) {
      const level = place(clamp(values[k] * scale, 0, 1));
      const color = board.branchColors[branches[k] % board.branchColors.length];
      const at = 4 * (i * size + j);
      for (let channel = 0; channel < 3; channel++) image.data[at + channel] = ground[channel] + level * (color[channel] - ground[channel]);
      image.data[at + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}
