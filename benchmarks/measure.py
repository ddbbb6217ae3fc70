"""Measuring: times of several functions in turn, peak memory in a fresh process, what the machine can do."""

from __future__ import annotations

import concurrent.futures.process
import ctypes
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from demo.timing import device_name, seconds_of

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # names of mallopt's parameters, as in malloc.h


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory until the process ends; does nothing where there is no glibc.

    It would give large blocks back to the system, which clears every page anew when they are asked for again; which
    call has to pay for that depends on what ran before it, so ratios would be noise.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)


def times_in_turn(
    functions: dict[str, Callable[[], Any]], budget: float = 4.0, min_rounds: int = 5, max_rounds: int = 200
) -> dict[str, list[float]]:
    """Times functions in turn, A B C A B C ..., so that a machine whose speed drifts treats them alike.

    Args:
        functions: by name; each is called once before the first round, uncounted.
        budget: seconds after which no new round starts, once `min_rounds` are done.

    Returns:
        Seconds of every round, by name, equally many for all.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - start > budget:
            break
        for name, function in functions.items():
            times[name].append(seconds_of(function))
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median over rounds of slow ÷ fast: how many times faster the second is."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def matmul_gflops(size: int = 1536, rounds: int = 7) -> float:
    """This machine's rate in a float32 matrix product, in 10⁹ floating-point operations a second (median)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, size, size, device=device)
    seconds = times_in_turn({"matmul": lambda: a @ b}, budget=0, min_rounds=rounds)["matmul"]
    return 2 * size**3 / statistics.median(seconds) / 1e9


def machine() -> dict[str, Any]:
    """The machine and the software that figures belong to."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matmul_gflops": round(matmul_gflops(), 1),
    }


def peak_memory_mb(make: Callable[..., Callable[[], Any]], *args: Any) -> float | None:
    """Memory that one call needs beyond what was held before it, in MiB, at its peak.

    Args:
        make: a module-level function that builds what is to be called from `args`; both go to a fresh process.

    Returns:
        Infinity if the machine has not as much. None where the system does not tell (it is read from Linux's /proc, or
        from CUDA's allocator).
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_probe, make, *args).result()
        except (MemoryError, concurrent.futures.process.BrokenProcessPool):
            return math.inf
        except RuntimeError as error:
            if "memory" in str(error):
                return math.inf
            raise


def _probe(make: Callable[..., Callable[[], Any]], *args: Any) -> float | None:
    available = psutil.virtual_memory().available  # so that it fails, before the system kills something for it
    resource.setrlimit(resource.RLIMIT_DATA, (available, available))
    function = make(*args)
    if torch.cuda.is_available():
        function()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        return None
    clear.write_text("5")  # resets the peak
    held = _status_kb("VmRSS")
    function()
    return (_status_kb("VmHWM") - held) / 2**10


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def print_report(report: dict[str, Any], *parts: str, as_json: bool) -> None:
    """Prints a report as one JSON object, or its machine and the tables of `parts`, each a list of rows."""
    if as_json:
        print(json.dumps(report, indent=1))
        return
    print(json.dumps(report["machine"]))
    for part in parts:
        print(table(report[part], list(report[part][0])))


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a Markdown table; numbers are rounded to three significant figures, None is a dash."""
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and math.isinf(value):
        return "does not fit"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
