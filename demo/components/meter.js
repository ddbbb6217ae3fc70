// A progress bar; see meter.py.
const root = element.querySelector(".view");
const bar = el("progress");
const text = el("span", "muted");
bar.max = 1;
root.append(bar, text);
root.setAttribute("role", "status");

function draw() {
  bar.value = props.value?.share ?? 0;
  bar.style.visibility = props.value ? "visible" : "hidden";
  text.textContent = readable(props.value?.text ?? "");
}

watch("value", draw);
draw();
