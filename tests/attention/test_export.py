"""Every method as one graph of any length: traced paths beside the eager ones, torch.compile, torch.export, ONNX."""

import sys

import pytest
import torch
from torch import Tensor

from attention.export import export_onnx, export_program

from .test_rollback import VARIANTS, tokens, variant_of

every_variant = pytest.mark.parametrize("name", VARIANTS)
TOLERANCE = {"atol": 3e-5, "rtol": 3e-5}
LENGTHS = (3, 17, 48)  # none is the one that is traced


def eager(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


@pytest.fixture
def as_traced(monkeypatch):
    """Has everything take the path that a graph takes, and compute."""
    for name, module in list(sys.modules.items()):
        if name.startswith("attention.") and hasattr(module, "traced"):
            monkeypatch.setattr(module, "traced", lambda: True)


@every_variant
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_a_graph_computes_is_what_is_computed_without_one(family, name, request):
    student = variant_of(family, name)
    texts = [tokens(2, length) for length in (1, 8, 31, 48)]
    expected = [eager(student, ids) for ids in texts]
    (gradient,) = torch.autograd.grad(expected[2].square().mean(), student.get_input_embeddings().weight)
    request.getfixturevalue("as_traced")
    found = [eager(student, ids) for ids in texts]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    (own,) = torch.autograd.grad(found[2].square().mean(), student.get_input_embeddings().weight)
    torch.testing.assert_close(own, gradient, atol=1e-3, rtol=1e-3)


@every_variant
@torch.no_grad()
def test_a_forward_compiles_to_one_graph(name):
    student, graphs = variant_of("gpt2", name), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(student, backend=backend, fullgraph=True)
    ids = tokens(2, 24)
    torch.testing.assert_close(eager(compiled, ids), eager(student, ids), **TOLERANCE)
    assert len(graphs) == 1


@every_variant
@torch.no_grad()
def test_an_exported_program_takes_any_length(name):
    student = variant_of("gpt2", name)
    program = export_program(student).module()
    for length in LENGTHS:
        ids = tokens(2, length)
        torch.testing.assert_close(program(ids), eager(student, ids), **TOLERANCE)


@pytest.mark.long
@every_variant
@torch.no_grad()
def test_an_onnx_file_takes_any_length(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    student = variant_of("gpt2", name)
    export_onnx(student, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for length in LENGTHS:
        ids = tokens(2, length)
        (found,) = session.run(None, {"input_ids": ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), eager(student, ids), **TOLERANCE)
