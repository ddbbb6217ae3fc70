"""The entry point, as a person starts it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from gradio_client import Client

import app
from demo.context import App
from demo.page import launch

from .conftest import free_port

ROOT = Path(app.__file__).parent


def test_checkpoints_come_from_the_command_line_or_the_environment(monkeypatch):
    monkeypatch.setenv("CHECKPOINTS", "runs/a user/repo@main")
    assert app.parse([]).checkpoints == ["runs/a", "user/repo@main"]
    assert app.parse(["--checkpoints", "runs/b", "--port", "7000"]).checkpoints == ["runs/b"]
    assert app.parse(["--checkpoints", "a b", "--checkpoints", "c"]).checkpoints == ["a b", "c"]
    monkeypatch.setenv("CHECKPOINTS", """'my runs/a' "b's"  runs/c\\ d\n user/repo@main""")
    assert app.parse([]).checkpoints == ["my runs/a", "b's", "runs/c d", "user/repo@main"]
    monkeypatch.delenv("CHECKPOINTS")
    assert app.parse([]).checkpoints == []


@pytest.mark.parametrize("variable", ["CHECKPOINTS", "ALLOWED_MODELS"])
def test_a_variable_whose_quotation_does_not_end_is_named(variable, monkeypatch, capsys):
    monkeypatch.setenv("SPACE_ID", "me/space")
    monkeypatch.setenv(variable, "runs/a 'runs/b")
    assert app.main([]) == 2
    assert f"the environment variable {variable} cannot be read: No closing quotation" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert app.main(["--port", str(other.getsockname()[1])]) == 2
    assert "port" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["-P"], ["-I"], []])
def test_it_finds_its_parts(options, tmp_path):
    command = [sys.executable, *options, str(ROOT / "app.py"), "--help"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.startswith("usage: app.py")
    assert found.returncode == 0


def test_it_serves_the_models_that_can_be_read_and_ends_when_it_is_interrupted(checkpoints, tmp_path):
    port = free_port()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": ' + "[" * 100_000)
    sources = [str(checkpoints / "masks"), "/nowhere", str(broken)]
    command = [sys.executable, "app.py", "--port", str(port), "--checkpoints", *sources]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
    )
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for(url, process)
        names = [model["name"] for model in Client(url, verbose=False).predict(api_name="/models")]
        assert {"base", "masks"} <= {name.removesuffix("-2") for name in names}
        job = Client(url, verbose=False).submit("The old house", max_new_tokens=400, api_name="/generate")
        while not any(run["columns"][0]["text"] for run in job.outputs()):
            assert not job.done()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # while texts are written
        start = time.monotonic()
        assert process.wait(30) == 0
        assert time.monotonic() - start < 5
        errors = process.stderr.read().decode()
        assert "there is no folder /nowhere" in errors
        assert "broken cannot be used" in errors
        assert "Traceback" not in errors
        assert "terminate" not in errors
    finally:
        process.kill()


def test_below_a_path_of_a_server_its_addresses_are_there(store, monkeypatch):
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/demo")
    served, url, _ = launch(App(store), port=free_port(), prevent_thread_lock=True, quiet=True)
    try:
        headers = {"Host": "example.org", "X-Forwarded-Proto": "https"}
        assert httpx.get(f"{url}config", headers=headers, timeout=60).json()["root"] == "https://example.org/demo"
    finally:
        served.blocks.close()


def heed_interrupts() -> None:
    """Undoes what a shell does to its background jobs, of which these tests may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, process.stderr.read().decode()
        try:
            httpx.get(url, timeout=2)
            return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise AssertionError(f"{url} did not answer")
