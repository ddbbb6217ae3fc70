#!/usr/bin/env bash
# gradio 6.31.0, gradio_client 2.7.2: an event that waits in the queue, with a slider and a gr.State as its inputs.
#
# Its inputs are of two moments: the slider's value is that of when the event was sent, the state's is that of when its
# turn comes. What another event stores in the state meanwhile is seen beside the slider as it was before; and if that
# event lowers the slider's maximum as well, the value that was allowed when it was sent is refused: an error that the
# visitor sees, and the function is not called. One would expect both inputs as they were on the page. Ends with 1 if
# that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet gradio==6.31.0 gradio_client==2.7.2
cd "$folder" && GRADIO_ANALYTICS_ENABLED=False bin/python - <<'PYTHON'
import sys
import threading

import gradio as gr
from gradio_client import Client

gate, entered = threading.Event(), threading.Event()


def hold():
    entered.set()
    gate.wait()


def choose(maximum):
    return "second", gr.Slider(maximum=maximum)


with gr.Blocks() as demo:
    state, size = gr.State("first"), gr.Slider(1, 10, 8)
    maximum, said = gr.Number(10), gr.JSON()
    one_lane = {"concurrency_id": "lane", "concurrency_limit": 1}
    gr.Button().click(hold, **one_lane, api_name="hold")
    gr.Button().click(lambda state, size: [state, size], [state, size], said, **one_lane, api_name="read")
    gr.Button().click(choose, maximum, [state, size], queue=False, api_name="choose")
url = demo.queue().launch(prevent_thread_lock=True, quiet=True)[1]


def read_while_chosen(maximum):
    """What an event finds that waited while another stored "second" and set the slider's maximum."""
    gate.clear(), entered.clear()
    client = Client(url, verbose=False)
    held = client.submit(api_name="/hold")
    entered.wait()
    waiting = client.submit(8, api_name="/read")
    while waiting.status().rank is None:  # it is in the queue
        threading.Event().wait(0.1)
    client.predict(maximum, api_name="/choose")
    gate.set()
    held.result()
    try:
        return waiting.result()
    except Exception as error:
        return str(error)


found = {maximum: read_while_chosen(maximum) for maximum in (10, 4)}
print(f"sent with 'first' and 8; maximum as before: {found[10]}; maximum lowered to 4: {found[4]}")
as_stated = found[10] == ["second", 8] and "greater than maximum" in str(found[4])
print("as stated above" if as_stated else "this has changed")
sys.stdout.flush()
demo.close()
sys.exit(not as_stated)
PYTHON
