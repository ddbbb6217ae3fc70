#!/usr/bin/env bash
# gradio 6.31.0 in a browser (playwright 1.65.2 with the system's chromium): a page whose stream of answers comes half a
# second late while what it sends does not, as behind a proxy that holds streams back, or while the page is busy.
#
# The server says that the stream ends when nothing of the page is left to answer. If the visitor presses another button
# before that has come, the page takes the stream for open, and then closes it: the second function is called on the
# server, but what it returns is not shown, after ten seconds neither. It is shown with the answer to a third event,
# whatever that is, as that opens the stream anew. One would expect the client to open it for an event without an
# answer. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet gradio==6.31.0 playwright==1.65.2
cd "$folder" && GRADIO_ANALYTICS_ENABLED=False bin/python - <<'PYTHON'
import shutil
import sys

import gradio as gr
from playwright.sync_api import sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LATE = """
const fetchNow = window.fetch.bind(window);
window.fetch = async (...asked) => {
  const response = await fetchNow(...asked);
  if (!String(asked[0].url ?? asked[0]).includes("queue/data")) return response;
  const later = new TransformStream({
    async transform(chunk, out) { await new Promise((done) => setTimeout(done, 500)); out.enqueue(chunk); },
  });
  return new Response(response.body.pipeThrough(later), { headers: response.headers });
};
"""
NAMES = ("one", "two", "three")
calls = []

with gr.Blocks() as demo:
    said = [gr.Textbox(label=f"Said by {name}") for name in NAMES]
    for name, box in zip(NAMES, said):
        gr.Button(name).click(lambda name=name: calls.append(name) or "done", None, box)
url = demo.queue().launch(prevent_thread_lock=True, quiet=True)[1]

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page = browser.new_page()
    page.add_init_script(LATE)
    page.goto(url)

    def click(name):
        page.get_by_role("button", name=name, exact=True).click()
        while name not in calls:
            page.wait_for_timeout(10)

    def shown():
        return [name for name in NAMES if page.get_by_label(f"Said by {name}", exact=True).input_value()]

    click("one")
    page.wait_for_timeout(200)  # the server has answered, the page has not got it
    click("two")
    page.wait_for_timeout(10_000)
    before = shown()
    click("three")
    page.wait_for_timeout(5_000)
    after = shown()
    browser.close()

print(f"called: {calls}; answers shown before the third event: {before}, after it: {after}")
as_stated = (calls, before, after) == (list(NAMES), ["one"], list(NAMES))
print("as stated above" if as_stated else "this has changed")
sys.stdout.flush()
demo.close()
sys.exit(not as_stated)
PYTHON
