"""Counting the memory of a forward pass."""

import torch

from demo.memory import PeakMemory


def test_counts_what_is_alive_at_the_same_time():
    x = torch.zeros(1000)  # allocated outside: not counted
    with PeakMemory() as memory:
        y = x + 1
        z = y.view(10, 100)  # a view: the same memory
        del y
        z = z * 2  # for a moment both
        del z
        torch.zeros(500)
    assert memory.bytes == 2 * 1000 * 4


def test_in_place_operations_allocate_nothing():
    x = torch.zeros(1000)
    with PeakMemory() as memory:
        x.add_(1)
        x[:10].mul_(2)
    assert memory.bytes == 0
