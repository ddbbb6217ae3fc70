"""The served app, through its endpoints and its raw HTTP interface."""

import asyncio
import copy
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from demo.context import App
from demo.limits import Limits
from demo.models import Access, ModelStore
from demo.page import build, launch

from .conftest import free_port


@pytest.fixture(scope="module")
def served(checkpoints):
    """The app's address and its store."""
    limits = Limits(new_tokens=60, prompt_characters=2000, seconds=30)
    store = ModelStore([checkpoints / "base", checkpoints / "masks"], limits, Access(None, (checkpoints,)))
    app, url, _ = launch(App(store), port=free_port(), mcp_server=True, prevent_thread_lock=True, quiet=True)
    yield url, store
    app.blocks.close()


@pytest.fixture(scope="module")
def client(served):
    return Client(served[0], verbose=False)


def test_a_visitor_gets_a_copy_of_the_page_and_none_of_the_app(served):
    """Gradio copies the page's config for each; what it cannot copy whole it copies piece by piece, models and all."""
    copied = copy.deepcopy(build(App(served[1])).config)
    assert copied["components"]


def test_a_visit_starts_nothing_on_a_tab_that_is_not_open(served):
    # Gradio takes the first event that leaves a State of an unopened tab as it is for a change of it.
    blocks = build(App(served[1]))
    functions = list(blocks.fns.values())
    on_load = [function for function in functions if any(event == "load" for _, event in function.targets)]
    filled = {output._id for function in on_load for output in function.outputs if isinstance(output, gr.State)}
    watched = {block for function in functions for block, event in function.targets if event == "change"}
    for state in map(blocks.blocks.get, filled & watched):
        parent = state.parent
        while parent is not None and not isinstance(parent, gr.Tab):
            parent = parent.parent
        assert parent is None or parent.id == "generate"  # the tab that is open


def test_models(client):
    models = client.predict(api_name="/models")
    assert [model["name"] for model in models] == ["base", "masks"]
    assert models[1]["base"] == "base"


def test_generate(client):
    run = client.predict("The old house", ["base", "masks"], max_new_tokens=8, seed=3, api_name="/generate")
    again = client.predict("The old house", ["base", "masks"], max_new_tokens=8, seed=3, api_name="/generate")
    assert [c["text"] for c in run["columns"]] == [c["text"] for c in again["columns"]]
    assert [c["stopped"] for c in run["columns"]] == ["length", "length"]
    assert run["columns"][1]["cost"]["keys_read"] < run["columns"][0]["cost"]["keys_read"]
    assert "scores" not in run["columns"][0]
    scored = client.predict("The old house", ["masks"], max_new_tokens=8, seed=3, scores=True, api_name="/generate")
    assert len(scored["columns"][0]["scores"]) == 8


def test_generate_streams(client):
    job = client.submit("The old house", ["base", "masks"], max_new_tokens=60, api_name="/generate")
    job.result(30)
    stages = [run["columns"][0]["stage"] for run in job.outputs()]
    assert stages[0] == "loading"
    assert stages[-1] == "done"


def test_endpoints_are_described(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/generate", "/models", "/attention"} <= set(endpoints)
    parameters = {p["parameter_name"]: p for p in endpoints["/generate"]["parameters"]}
    assert parameters["temperature"]["type"]["type"] == "number"
    assert parameters["temperature"]["parameter_default"] == 0.8
    assert "same seed" in endpoints["/generate"]["description"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "x" * 1_000_000}, "1,000,000 characters"),
        ({"prompt": "x", "models": ["<b>"]}, "No model <b>"),
        ({"prompt": "x", "temperature": -1}, "Temperature"),
        ({"prompt": "x", "max_new_tokens": 10**9}, "at most 60"),
        ({"prompt": {"a": 1}}, "prompt is empty"),
    ],
)
def test_bad_requests_are_answered_with_what_is_wrong(client, arguments, message):
    with pytest.raises(AppError, match=message):
        client.predict(**arguments, api_name="/generate")


def call(url: str, prompt: str) -> dict:
    """Posts a prompt, written as a JSON string's inside, to /generate; the run that comes back."""
    body = json.dumps({"data": ["PROMPT", ["base"], 0.8, 40, 0.95, 1.1, 2, 0, False]}).replace("PROMPT", prompt)
    headers = {"Content-Type": "application/json"}
    event = httpx.post(f"{url}gradio_api/call/generate", content=body.encode(), headers=headers).raise_for_status()
    with httpx.stream("GET", f"{url}gradio_api/call/generate/{event.json()['event_id']}", timeout=30) as answer:
        answer = answer.read().decode()
    assert "event: complete" in answer
    return json.loads(answer.rsplit("data: ", 1)[1])[0]


@pytest.mark.parametrize(
    "prompt",
    [r"\u0000\u001b[31m", r"\u202eright to left", "<script>alert(1)</script>", "${1+1} {{value}}", "😀é", "\\n\\n"],
)
def test_hostile_prompts_come_back_as_they_are(served, prompt):
    column = call(served[0], prompt)["columns"][0]
    assert "".join(column["tokens"][: column["prompt_length"]]) == json.loads(f'"{prompt}"')


def test_a_lone_surrogate_is_replaced(served):
    column = call(served[0], r"a\ud800b")["columns"][0]
    assert "".join(column["tokens"][: column["prompt_length"]]) in ("a\ufffdb", "a?b")


def test_files_of_the_machine_stay_there(served, checkpoints):
    url = served[0]
    for path in (checkpoints / "base" / "config.json", "app.py", "/etc/passwd", "demo/../app.py"):
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)
    answer = httpx.post(f"{url}gradio_api/upload", files={"files": ("big.bin", b"x" * 2_000_000)})
    assert answer.status_code == 413


def test_a_client_that_leaves_frees_the_worker(served, client):
    job = client.submit("The old house", ["base", "masks"], max_new_tokens=60, api_name="/generate")
    while not job.outputs():
        time.sleep(0.01)
    job.cancel()
    start = time.monotonic()
    client.predict("x", ["base"], max_new_tokens=1, api_name="/generate")
    assert time.monotonic() - start < 20


def test_busy_is_said(checkpoints):
    store = ModelStore([checkpoints / "base"], Limits(queue=1), Access())
    app, url, _ = launch(App(store), port=free_port(), prevent_thread_lock=True, quiet=True)
    held = store.get("base").lock
    try:
        client = Client(url, verbose=False)
        with held:  # the first one runs and waits for the model, the second one queues
            jobs = [client.submit("x", ["base"], api_name="/generate")]
            wait_until(lambda: app.blocks._queue.active_jobs.count(None) < len(app.blocks._queue.active_jobs))
            jobs.append(client.submit("x", ["base"], api_name="/generate"))
            wait_until(lambda: len(app.blocks._queue) == 1)
            with pytest.raises(Exception, match=r"(?i)queue is full"):
                client.predict("x", ["base"], api_name="/generate")
        assert all(job.result(30)["columns"][0]["stage"] == "done" for job in jobs)
    finally:
        app.blocks.close()


def wait_until(condition) -> None:
    event = threading.Event()
    for _ in range(400):
        if condition():
            return
        event.wait(0.05)
    raise AssertionError("waited 20 s in vain")


def test_endpoints_are_mcp_tools(served):
    async def talk() -> tuple[dict, list]:
        async with (
            streamable_http_client(f"{served[0]}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool.inputSchema for tool in (await session.list_tools()).tools}
            answers = [
                await session.call_tool("generate", {"prompt": "The old house", "max_new_tokens": 4}),
                await session.call_tool("models", {}),
                await session.call_tool("generate", {"prompt": ""}),
            ]
            return tools, answers

    with ThreadPoolExecutor(1) as pool:  # a browser test before this one leaves its event loop running here
        tools, (run, models, refused) = pool.submit(asyncio.run, talk()).result()
    assert {"generate", "models", "attention", "score"} <= set(tools)
    assert [column["stage"] for column in json.loads(run.content[0].text)["columns"]] == ["done", "done"]
    assert run.structuredContent == json.loads(run.content[0].text)
    assert [model["name"] for model in models.structuredContent["result"]] == ["base", "masks"]
    assert refused.isError
    assert "prompt is empty" in refused.content[0].text
    given = tools["generate"]["properties"]
    assert (given["seed"]["default"], given["scores"]["default"]) == (0, False)
    assert tools["attention"]["properties"]["layer"]["default"] == 0


def test_every_parameter_of_every_endpoint_is_described(served):
    endpoints = httpx.get(f"{served[0]}gradio_api/info").json()["named_endpoints"]
    assert {"/generate", "/models", "/attention", "/speed", "/score"} <= set(endpoints)
    for endpoint in endpoints.values():
        assert endpoint["description"]
        for parameter in endpoint["parameters"]:
            assert len(parameter["python_type"]["description"]) > 8
            assert parameter["label"] == parameter["parameter_name"]


def test_score(client):
    scores = client.predict("The old house stood at the end of the lane.", ["base", "masks"], api_name="/score")
    assert [mean["name"] for mean in scores["means"]] == ["base", "masks"]
    with pytest.raises(AppError, match="text is empty"):
        client.predict("", api_name="/score")
