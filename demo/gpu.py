"""ZeroGPU Spaces lend a GPU to one call of a function, which then runs in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

try:
    import spaces
except ImportError:
    spaces = None

T = TypeVar("T")
IS_LENT = spaces is not None and "SPACES_ZERO_GPU" in os.environ


def with_gpu(function: Callable[..., Iterator[T]], seconds: float) -> Callable[..., Iterator[T]]:
    """`function` with a GPU for at most `seconds` a call where one is lent, elsewhere `function` itself.

    Its arguments and what it yields are copied from one process to the other; what it changes is not.
    """
    return spaces.GPU(function, duration=round(seconds)) if IS_LENT else function
