// The page's address; see address.py.
const LONGEST = 8000; // characters; servers refuse more

function put() {
  const { parameters = {}, push = false } = props.value || {};
  const query = new URLSearchParams(location.search);
  for (const [name, values] of Object.entries(parameters)) {
    if (JSON.stringify(query.getAll(name)) === JSON.stringify(values)) continue; // its place says nothing
    query.delete(name);
    for (const value of values) query.append(name, value);
  }
  let address = location.pathname + (query.size ? "?" + query : "");
  if (address.length > LONGEST) {
    const rest = new URLSearchParams([...query].filter(([, value]) => value.length < 100));
    for (const name of Object.keys(parameters)) rest.delete(name);
    address = location.pathname + (rest.size ? "?" + rest : "");
  }
  if (address === location.pathname + location.search) return;
  history[push ? "pushState" : "replaceState"](null, "", address);
}

window.addEventListener("popstate", () => location.reload());
watch("value", put);
