// Shared by every component; `options` come from canvas.py, `element`, `props`, `watch` and `trigger` from gr.HTML.

// An element with a class, text and children; text is never read as markup.
function el(tag, className, text, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  node.append(...children);
  return node;
}

// Characters that would be invisible or would move others: controls, zero-width and direction marks, lone surrogates.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

function namedCode(character) {
  return "⟨" + character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";
}

// Text as it reads, its unseen characters named.
function readable(text) {
  return String(text).replace(UNSEEN, namedCode);
}

// A token as a label: white space is visible too.
function visible(text) {
  return readable(text).replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\u00a0/g, "⍽");
}

function shorten(text, length) {
  const characters = Array.from(text);
  return characters.length > length ? characters.slice(0, length - 1).join("") + "…" : text;
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

// Three significant digits, without exponents where a person would not expect them.
function formatNumber(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e15 || size < 1e-4) return value.toExponential(1);
  if (Number.isInteger(value) && size < 1e5) return value.toLocaleString("en");
  if (size >= 1000) {
    const step = Math.min(Math.floor(Math.log10(size) / 3), 4);
    return Number((value / 1000 ** step).toPrecision(3)) + ["", "k", "M", "G", "T"][step];
  }
  return String(Number(value.toPrecision(3)));
}

function isDark() {
  return document.body.classList.contains("dark");
}

// Calls back when the page turns dark or light.
function onTheme(callback) {
  let dark = isDark();
  new MutationObserver(() => {
    if (dark !== isDark()) {
      dark = isDark();
      callback();
    }
  }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
}

// Runs a function at most once a frame.
function throttled(callback) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      callback();
    });
  };
}
