"""How long something takes, and on what."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch


def synchronize() -> None:
    """Waits for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any]) -> float:
    """How long one call takes, in seconds."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def device_name() -> str:
    """The accelerator's name, or the CPU's where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()


def here_and_now() -> str:
    """This machine and this day, in words."""
    today = date.today()
    threads = torch.get_num_threads()
    return f"on {device_name()} with {threads} thread{'s' * (threads != 1)} on {today.day} {today:%B %Y}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
