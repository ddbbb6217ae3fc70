#!/usr/bin/env bash
# gradio 6.31.0 in a browser (playwright 1.65.2 with the system's chromium): `click(first).then(second)`, or `.success`,
# where the second function takes its time.
#
# A click while the second function still runs for an earlier one calls the first function and not the second: the chain
# is cut in the middle, and neither page nor log says so. A chained event has a trigger mode of its own, which is "once"
# unless it is given, also where the event that it follows takes every click (`trigger_mode="multiple"`, as here). What
# the first function began, for instance a button that it switched off, stays as it is. With `trigger_mode="always_last"`
# on the chained event too, it is called again. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet gradio==6.31.0 playwright==1.65.2
cd "$folder" && GRADIO_ANALYTICS_ENABLED=False bin/python - <<'PYTHON'
import shutil
import sys
import threading

import gradio as gr
from playwright.sync_api import sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
gate, calls = threading.Event(), []


def slow(name):
    calls.append(f"second of {name}")
    gate.wait()


with gr.Blocks() as demo:
    for name, mode in (("default", None), ("last", "always_last")):
        begun = gr.Button(name).click(lambda name=name: calls.append(f"first of {name}"), trigger_mode="multiple")
        begun.then(lambda name=name: slow(name), trigger_mode=mode)
url = demo.queue().launch(prevent_thread_lock=True, quiet=True)[1]


def wait_for(count, call, page):
    for _ in range(100):
        if calls.count(call) >= count:
            return
        page.wait_for_timeout(100)


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page = browser.new_page()
    page.goto(url)
    for name in ("default", "last"):
        gate.clear()
        for count in (1, 2):
            page.get_by_role("button", name=name).click()
            wait_for(count, f"first of {name}", page)
            wait_for(1, f"second of {name}", page)
        gate.set()
        page.wait_for_timeout(3000)  # for what would still come
    browser.close()

found = {call: calls.count(call) for call in sorted(set(calls))}
print("calls after two clicks each:", found)
as_stated = found == {"first of default": 2, "second of default": 1, "first of last": 2, "second of last": 2}
print("as stated above" if as_stated else "this has changed")
sys.stdout.flush()
demo.close()
sys.exit(not as_stated)
PYTHON
