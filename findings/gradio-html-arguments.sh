#!/usr/bin/env bash
# gradio 6.31.0: a component derived from gr.HTML whose constructor has an argument of its own.
#
# The component's config has a property for each argument of the constructor that the component has as an attribute.
# gr.HTML finds an attribute under any name that its script has in quotes: it takes it for an event. So an argument
# "ticks", and a script with "ticks" in quotes, puts a function that holds the component into the config. For each GET
# of the page Gradio deep-copies the config, and through the component whatever the functions of the page's events
# hold: here an object that counts its copies. Without the quotes in the script nothing is copied.
# Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet gradio==6.31.0
cat > "$folder/page.py" <<'PYTHON'
import sys

import gradio as gr
import httpx


class Panel(gr.HTML):
    def __init__(self, value=None, *, ticks=(), script="", **options):
        super().__init__(value, js_on_load=script, **options)


class Counter:
    def __init__(self):
        self.copies = 0

    def __deepcopy__(self, memo):
        self.copies += 1
        return self


class Loader:
    def __init__(self, held):
        self.held = held

    def __call__(self):
        return "loaded"


def visits(script, count=3):
    held = Counter()
    with gr.Blocks() as page:
        panel = Panel("text", script=script)
        page.load(Loader(held), None, gr.Textbox())
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    held.copies = 0
    for _ in range(count):
        httpx.get(url).raise_for_status()
    page.close()
    return type(panel.get_config().get("ticks")).__name__, held.copies


quoted = visits("element.dataset['ticks'] = 1")
bare = visits("element.dataset.ticks = 1")
print(f"'ticks' in quotes: the config has a {quoted[0]} for it; copies of the object by 3 visits: {quoted[1]}")
print(f"no quotes: {bare[0]}, {bare[1]} copies")
sys.exit(not (quoted[0] == "partial" and quoted[1] >= 3 and bare == ("NoneType", 0)))
PYTHON
"$folder/bin/python" "$folder/page.py"
