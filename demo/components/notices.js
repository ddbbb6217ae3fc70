// Messages; see notices.py.
const root = element.querySelector(".view");
root.setAttribute("role", "status");

function draw() {
  const notices = (props.value || []).map(({ level, text }) => el("div", "notice " + level, readable(text)));
  root.replaceChildren(...notices);
}

watch("value", draw);
draw();
