"""What counts as a request to stop."""

import signal

import pytest

from trainer import signals
from trainer.signals import StopRequest

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture
def deaths():
    """Signals that would have ended the process."""
    seen: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: seen.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@BOTH
def test_the_first_signal_and_its_echo_ask(number: signal.Signals, deaths: list[int]):
    stop = StopRequest()
    assert not stop.asked
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)
    assert stop.asked
    assert deaths == []
    stop.close()


@BOTH
def test_a_later_signal_acts(number: signal.Signals, deaths: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "ECHO_SECONDS", -1.0)
    stop = StopRequest()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(number)
    assert stop.asked
    assert deaths == [number]


def test_afterwards_signals_do_what_they_did(deaths: list[int]):
    StopRequest().close()
    signal.raise_signal(signal.SIGTERM)
    assert deaths == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["/bin/python", "/bin/accelerate", "launch", "--cpu", "trainer/train.py"], ["--cpu", "trainer/train.py"]),
        (["python", "-m", "accelerate.commands.launch", "trainer/train.py"], ["trainer/train.py"]),
        (["/bin/accelerate-launch", "trainer/train.py"], ["trainer/train.py"]),
        (["bash", "/home/me/accelerate/job.sh"], None),
        (["torchrun", "--nproc_per_node", "2", "trainer/train.py"], None),
    ],
)
def test_the_launcher_is_known_by_its_command(
    words: list[str], arguments: list[str] | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("psutil.Process.cmdline", lambda self: words)
    assert signals.launcher_arguments() == arguments


def test_the_death_of_the_launcher_asks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "launcher_arguments", list)
    monkeypatch.setattr("os.getppid", lambda: 2)
    stop = StopRequest()
    assert not stop.asked
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert stop.asked
    stop.close()
