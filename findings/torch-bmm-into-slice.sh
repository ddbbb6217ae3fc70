#!/usr/bin/env bash
# torch 2.13.0, Python 3.10 or newer, on a CPU: torch.bmm with `out` a slice of a wider tensor.
#
# A batch of products of small matrices is one batched call of the library underneath, whether `out` is given or not.
# If `out` is a slice of the last dimension, scores[:, :, 8:] for one, the same matrices are multiplied one after
# another, each by a call of its own with views of its own; so is baddbmm_ on such a slice. The result is the same and
# took about twice as long here; torch.mm writes into such a slice with no call more. The operand's own slices do no
# harm. Ends with 1 if the product into the slice needs no views a matrix any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
"$folder/bin/python" - <<'PYTHON'
import statistics
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

torch.manual_seed(0)
MATRICES = 48
a, b = torch.randn(MATRICES, 64, 64), torch.randn(MATRICES, 64, 128)
whole, wide = torch.empty(MATRICES, 64, 128), torch.empty(MATRICES, 64, 136)
longer = torch.randn(MATRICES, 72, 128)
PRODUCTS = {
    "no out": lambda: torch.bmm(a, b),
    "out, a tensor of its own": lambda: torch.bmm(a, b, out=whole),
    "no out, an operand that is a slice": lambda: torch.bmm(a, longer[:, 8:]),
    "out, a slice": lambda: torch.bmm(a, b, out=wide[:, :, 8:]),
    "baddbmm_ on a slice": lambda: wide[:, :, 8:].baddbmm_(a, b, beta=0),
}


def views(function):
    function()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return sum(event.name == "aten::select" for event in seen.events())


def milliseconds(function):
    times = []
    for _ in range(200):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


found = {name: views(function) for name, function in PRODUCTS.items()}
for name, function in PRODUCTS.items():
    print(f"{name}: {found[name]} views of single matrices, {milliseconds(function):.2f} ms")
same = torch.allclose(torch.bmm(a, b, out=wide[:, :, 8:]), torch.bmm(a, b), atol=1e-4)
print(f"same result: {same}")
as_described = same and [count // MATRICES for count in found.values()] == [0, 0, 0, 3, 3]
sys.exit(not as_described)
PYTHON
