"""A model as one graph that takes texts of any length, for other runtimes.

    python -m attention.export SPEC --output FILE.onnx

where SPEC is a folder or a name on the Hub. The graph reads whole texts, without padding and without a cache. It needs
`onnx` and `onnxscript`, which are in requirements-dev.txt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from .errors import CheckpointError
from .loading import load

EXAMPLE = (2, 24)  # rows and tokens that are traced
MOST = 65_536  # tokens, for a model that says nothing


class Logits(nn.Module):
    """A causal language model as a function from ids (B, T) to logits (B, T, V)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def export_program(model: PreTrainedModel) -> ExportedProgram:
    """The graph of a forward pass in evaluation mode, from `input_ids` (B, T) to logits (B, T, V).

    T is any length from 2 to what the model holds, B is 2 as traced. In the graph all blocks of a text are computed
    together, so it needs more memory than the model itself, which goes some at a time.
    """
    training, ids = model.training, torch.zeros(EXAMPLE, dtype=torch.long, device=model.device)
    most = getattr(model.config, "max_position_embeddings", None) or MOST
    try:
        return torch.export.export(
            Logits(model.eval()),
            (ids,),
            dynamic_shapes={"input_ids": {1: Dim.DYNAMIC(min=2, max=most)}},
            prefer_deferred_runtime_asserts_over_guards=True,  # what holds for any length need not be proved for it
        )
    finally:
        model.train(training)


def export_onnx(model: PreTrainedModel, path: str | Path) -> None:
    """Writes the graph of `export_program` as an ONNX file, with `input_ids` and `logits` as its names.

    Raises:
        ImportError: if onnx or onnxscript is not installed.
    """
    program = torch.onnx.export(
        export_program(model),
        dynamo=True,
        output_names=["logits"],
        custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
        verbose=False,
    )
    program.save(str(path))


def _stable_sort() -> Callable[..., Any]:
    """`aten.sort.stable`, which PyTorch has no ONNX form of: of equal values, TopK has the earlier ones first.

    That is so in both directions by the operator's definition (onnx.ai, TopK).
    """
    op = import_module("onnxscript").opset18

    def sort_stable(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]), axis=0)
        return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)

    return sort_stable


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 2 for what cannot be loaded or written."""
    parser = argparse.ArgumentParser(prog="python -m attention.export", description=__doc__.splitlines()[0])
    parser.add_argument("spec", help="a folder, or user/repo[/subfolder][@revision]")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the ONNX file to write")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    try:
        export_onnx(load(options.spec)[0], options.output)
    except (CheckpointError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
