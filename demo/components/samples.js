// Texts through training; see samples.py.
const root = element.querySelector(".view");
const empty = el("div", "empty", options.empty);
const body = el("div");
const step = el("output", "step");
const slider = el("input");
const texts = el("div", "texts");
const label = el("label", "control", null, "After", step, slider);
slider.type = "range";
slider.min = 0;
slider.setAttribute("aria-label", "Step of training");
body.append(label, texts);
root.append(body, empty);

let samples = [];
let pairs = [];

// Boxes for the texts of the last step are made once; moving the slider only changes what they say.
function build() {
  samples = JSON.parse(JSON.stringify(props.value || []));
  empty.hidden = samples.length > 0;
  body.hidden = !samples.length;
  if (!samples.length) return;
  pairs = samples[samples.length - 1].texts.map(() => {
    const prompt = el("div", "prompt");
    const variant = el("p");
    const base = el("p");
    const columns = el("div", "pair", null, box("In training", variant), box("Base", base));
    texts.append(el("section", "sample", null, prompt, columns));
    return { prompt, variant, base, node: columns.parentNode };
  });
  texts.replaceChildren(...pairs.map((pair) => pair.node));
  slider.hidden = samples.length < 2;
  slider.max = samples.length - 1;
  slider.value = samples.length - 1;
  show();
}

function box(title, text) {
  return el("div", "box", null, el("div", "muted small", title), text);
}

function show() {
  const sample = samples[Number(slider.value)];
  step.textContent = ` step ${sample.step.toLocaleString("en")} `;
  slider.setAttribute("aria-valuetext", step.textContent);
  pairs.forEach((pair, index) => {
    const text = sample.texts[index];
    pair.node.hidden = !text;
    if (!text) return;
    pair.prompt.textContent = readable(text.prompt) || "(the beginning of a text)";
    pair.variant.textContent = readable(text.variant);
    pair.base.textContent = readable(text.base ?? "");
    pair.base.parentNode.hidden = text.base === null || text.base === undefined;
  });
}

slider.addEventListener("input", show);
watch("value", build);
build();
