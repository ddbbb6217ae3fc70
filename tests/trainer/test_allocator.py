"""Memory that is kept, seen in the pages that the system has to clear."""

import subprocess
import sys

MEASURE = """
import resource, sys
import torch
from trainer.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    keep_freed_memory()
faults(), faults()  # the heap has grown as far as it needs to
print(faults())
"""


def pages_cleared(mode: str) -> int:
    return int(subprocess.run([sys.executable, "-c", MEASURE, mode], capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_not_cleared_again():
    assert pages_cleared("kept") < pages_cleared("given back") / 10
