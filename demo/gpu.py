"""ZeroGPU Spaces lend a GPU to one call of a function, which then runs in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from math import ceil
from typing import TypeVar

try:
    import spaces
except ImportError:
    spaces = None

T = TypeVar("T")
IS_LENT = spaces is not None and "SPACES_ZERO_GPU" in os.environ


def with_gpu(function: Callable[..., Iterator[T]], seconds: Callable[..., float]) -> Callable[..., Iterator[T]]:
    """`function` with a GPU where one is lent, elsewhere `function` itself.

    Its arguments and what it yields are copied from one process to the other; what it changes is not.

    Args:
        seconds: how long a call with the same arguments may take; a Space refuses by what is declared.
    """
    return spaces.GPU(function, duration=lambda *given: ceil(seconds(*given))) if IS_LENT else function
