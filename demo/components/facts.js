// Labels with values; see facts.py.
const root = element.querySelector(".view");
const list = el("dl", "facts");
root.append(list);

function draw() {
  const facts = (props.value || []).map(([label, value]) => {
    return el("div", value.length > 60 ? "fact wide" : "fact", null, el("dt", "muted small", readable(label)), el("dd", null, readable(value)));
  });
  list.replaceChildren(...facts);
}

watch("value", draw);
draw();
