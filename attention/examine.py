"""What is asked of a stranger's files before anything is built from them, and how their faults are told."""

from __future__ import annotations

import math
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from .errors import BrokenCheckpointError, CheckpointError, NotAModelError

MOST_LAYERS = 1000
MOST_EXPERTS = 10_000
LARGEST = 2**27  # any other size in a config: widths, vocabularies, positions
COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # of which every model has one, at least 1
LAYERS = re.compile(r"layers?$|depth$")
SIZES = re.compile(r"^(n|num|max)_|_(size|dim|rank|layers?|experts|ctx|positions?|heads?)$")
SPARE_MODULES, SPARE_ELEMENTS = 10_000, 2**20  # beyond what the files justify: parts without weights, tied matrices
CGROUP = Path("/sys/fs/cgroup")


@contextmanager
def refusing(what: object, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Has whatever a library raises over a stranger's files leave as a `CheckpointError`.

    Args:
        what: the folder, or the file, that is read.
        but: what gets through, as it may be the caller's mistake.

    Raises:
        CheckpointError: as it came; if the memory does not suffice.
        NotAModelError: for everything else; those who interrupt or end the process get through.
    """
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit, GeneratorExit, *but):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CheckpointError(f"{what} needs more memory than there is: {_line(error)}") from error
    except BaseException as error:  # panics of libraries in Rust are no Exceptions
        raise NotAModelError(f"{what} cannot be used: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """An error in a few hundred characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def config_problems(content: Mapping[str, Any]) -> list[str]:
    """What in a config.json no model has: numbers that are none, and sizes past every bound. A sentence each.

    The options of the attention have bounds of their own, see `mechanism.MechanismConfig`.
    """
    problems = []
    for place, key, value in _numbers({name: part for name, part in content.items() if name != "attention"}, ""):
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{place} is {value}; it must be a finite number")
            continue
        most = MOST_LAYERS if LAYERS.search(key) else MOST_EXPERTS if key.endswith("experts") else LARGEST
        least = 1 if key in COUNTS else -1  # which stands for "none" in some
        if is_size(key) and value < least:
            problems.append(f"{place} is {value}; it must be at least {least}")
        if is_size(key) and value > most:
            problems.append(
                f"{place} is {value:.6g}; the most is {most:,}" if value < 1e300 else f"{place} is too large"
            )
    return problems[:20]


def is_size(name: str) -> bool:
    """Whether an entry of a config says how large something is, by its name."""
    return bool(SIZES.search(name) or LAYERS.search(name))


def other_sizes(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The sizes in which two configs differ, by name."""
    return sorted(name for name in one.keys() & other.keys() if is_size(name) and one[name] != other[name])


def _numbers(value: Any, place: str, key: str = "") -> Iterator[tuple[str, str, int | float]]:
    """Every number in plain data, with where it stands and the name that it stands under."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{place}.{name}" if place else str(name), str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, place, "")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, key, value


@contextmanager
def bounded(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Stops the building of a model that outgrows the tensors there are for it, before it takes time and memory.

    Raises:
        ValueError: from within the model's constructor.
    """
    modules = SPARE_MODULES + 20 * len(tensors)
    elements = SPARE_ELEMENTS + 2 * sum(tensor.numel() for tensor in tensors.values())
    thread = threading.get_ident()
    places = {tensor.data_ptr() for tensor in tensors.values()} - {0}
    counted: dict[int, weakref.ref[nn.Parameter]] = {}

    def is_new(parameter: nn.Parameter) -> bool:
        """Whether it is none of the tensors, and none that was counted: tied matrices come several times."""
        known = counted.get(id(parameter))
        if (known is not None and known() is parameter) or parameter.data_ptr() in places:
            return False
        counted[id(parameter)] = weakref.ref(parameter)
        return True

    def count_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        if threading.get_ident() == thread:
            modules -= 1
            if modules < 0:
                raise ValueError("the config asks for many more layers than there are weights")

    def count_parameter(parent: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal elements
        if threading.get_ident() == thread and parameter is not None and is_new(parameter):
            elements -= parameter.numel()
            if elements < 0:
                raise ValueError("the config asks for many more weights than there are")

    hooks = [
        register_module_module_registration_hook(count_module),
        register_module_parameter_registration_hook(count_parameter),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shape_problems(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """Where tensors of files differ from the places that a model has for them, in shape or in kind. A sentence each.

    Args:
        tensors: by name.
        places: the model's state by name.
        prefix: of the body's names, which old files leave out.
    """
    problems = []
    for name, tensor in tensors.items():
        place = places.get(name, places.get(f"{prefix}.{name}"))
        if place is None:
            continue
        if tensor.shape != place.shape:
            problems.append(f"{name} is {list(tensor.shape)} in the file, and the config asks for {list(place.shape)}")
        elif tensor.is_floating_point() != place.is_floating_point():
            problems.append(f"{name} is {tensor.dtype} in the file, and the config asks for {place.dtype}")
    return problems


def largest(tensor: Tensor) -> float:
    """The largest magnitude in a tensor, in one pass; NaN if it holds one."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    if tensor.element_size() == 1:  # what fewer bits hold is compared in more
        tensor = tensor.float()
    least, most = torch.aminmax(tensor)
    return max(abs(float(least)), abs(float(most)))


def number_problems(magnitudes: Mapping[str, float], dtype: torch.dtype) -> list[str]:
    """Which tensors, by their largest magnitudes, are not finite numbers in `dtype`. A sentence each."""
    problems, limit = [], torch.finfo(dtype).max
    for name, magnitude in magnitudes.items():
        if not math.isfinite(magnitude):
            problems.append(f"{name} holds numbers that are infinite or none (NaN)")
        elif magnitude > limit:
            problems.append(f"{name} holds {magnitude:.3g}, which is infinite in {dtype}; load it in another dtype")
    return problems


def check_memory(needed: float, device: torch.device | str, what: object) -> None:
    """Compares bytes that are about to be taken with those that are free.

    Raises:
        CheckpointError: if they do not suffice.
    """
    free = free_memory(torch.device(device))
    if free is not None and needed > free:
        raise CheckpointError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory on {device}, and {free / 1e9:.1f} GB are free; "
            "free some, or choose another dtype or device"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that may be taken on a device, those that a container may take for a CPU; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass  # another system than Linux
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        reclaimable = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        found.append(int(limit) - int(used) + int(reclaimable[1] if reclaimable else 0))
    except (OSError, ValueError):
        pass  # no limit, or none of this kind
    return min(found, default=None)


def refuse_numbers(folder: Path, magnitudes: Mapping[str, float], dtype: torch.dtype) -> None:
    """Refuses tensors that are not finite numbers in `dtype`.

    Raises:
        BrokenCheckpointError: naming all of them.
    """
    if problems := number_problems(magnitudes, dtype):
        raise BrokenCheckpointError(folder, problems)
