// The page's address; see address.py.
const LONGEST = 8000; // characters; servers refuse more
const SHORT = 100; // of values that no address is too long for

let left = false; // the page is on its way to another address

function put() {
  if (left) return; // what still comes belongs to the page that is left
  const { parameters = {}, push = false } = props.value || {};
  const query = new URLSearchParams(location.search);
  for (const [name, values] of Object.entries(parameters)) {
    if (JSON.stringify(query.getAll(name)) === JSON.stringify(values)) continue; // its place says nothing
    query.delete(name);
    for (const value of values) query.append(name, value);
  }
  const written = () => location.pathname + (query.size ? "?" + query : "");
  if (written().length > LONGEST) {
    for (const [name, values] of Object.entries(parameters)) if (values.some((value) => value.length > SHORT)) query.delete(name);
  }
  const address = written();
  if (address === location.pathname + location.search) return;
  history[push ? "pushState" : "replaceState"](null, "", address);
}

window.addEventListener("popstate", () => {
  left = true;
  location.reload();
});
watch("value", put);
