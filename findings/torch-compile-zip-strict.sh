#!/usr/bin/env bash
# torch 2.9.0, Python 3.10 or newer: torch.compile and zip(..., strict=False).
#
# zip(a, b, strict=False) stops at the end of the shorter one, as zip(a, b) does. In torch.compile(fullgraph=True) the
# second works, and the first raises UserError, "zip() has one argument of len differing from others": that strict is
# named counts, not what it says. Without fullgraph the function runs without being compiled, and nothing is said.
# torch 2.13.0 compiles both. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.9.0 numpy==2.2.6
"$folder/bin/python" - <<'PYTHON'
import sys

import torch


def unnamed(x):
    for name, part in zip(("q", "k", "v"), (x, x)):
        x = x + len(name) * part
    return x


def named(x):
    for name, part in zip(("q", "k", "v"), (x, x), strict=False):
        x = x + len(name) * part
    return x


def compiled(function, **options):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    try:
        result = torch.compile(function, backend=count, **options)(torch.ones(1)).item()
    except Exception as error:
        result = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return result, len(graphs)


print(f"without torch.compile: {unnamed(torch.ones(1)).item()} and {named(torch.ones(1)).item()}")
found = {}
for function in (unnamed, named):
    for options in ({"fullgraph": True}, {}):
        found[function.__name__, bool(options)] = compiled(function, **options)
        result, graphs = found[function.__name__, bool(options)]
        print(f"{function.__name__}, {options or 'no options'}: {result}, {graphs} graphs")
whole, part = found["named", True], found["named", False]
as_described = (
    found["unnamed", True] == (3.0, 1)
    and str(whole[0]).startswith("UserError: zip() has one argument of len differing")
    and part == (3.0, 0)
)
sys.exit(not as_described)
PYTHON
