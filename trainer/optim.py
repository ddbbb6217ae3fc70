"""Optimisers and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers.pytorch_utils import Conv1D

from attention.families import FUSED
from attention.mechanism import is_mechanism
from attention.variant import position_table

from .config import PretrainConfig, ScheduleConfig, StageConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Layout:
    """How the weight of a linear map is stored.

    Attributes:
        out_first: (out, in), as `nn.Linear` has it, not (in, out), as transformers' `Conv1D` has it.
        parts: how many maps of the same input lie in it side by side (queries, keys, values).
        heads: how often they do so: once, or head by head.
    """

    out_first: bool = False
    parts: int = 1
    heads: int = 1

    def split(self, weight: Tensor) -> Tensor:
        """(parts, in, out / parts) the maps in a weight."""
        matrix = weight.mT if self.out_first else weight
        return matrix.unflatten(1, (self.heads, self.parts, -1)).movedim(2, 0).flatten(2).contiguous()

    def join(self, maps: Tensor) -> Tensor:
        """The weight whose maps (parts, in, out / parts) are."""
        matrix = maps.unflatten(2, (self.heads, -1)).movedim(0, 2).flatten(1)
        return matrix.mT if self.out_first else matrix


class Muon(Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Newton–Schulz runs in float32: `torch.optim.Muon` runs it in bfloat16, which takes CPUs without bfloat16 units a
    hundred times as long.

    Args:
        params: matrices, or parameter groups of them; a group may set `layout`.
        lr: learning rate; the update of an (in, out) matrix has spectral norm about lr · max(1, out/in)^½.
        momentum: of Nesterov's kind.
        weight_decay: decoupled.
        layout: how matrices are stored.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        layout: Layout = Layout(),
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "layout": layout})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        direction = parameter.grad.lerp(buffer, group["momentum"])
        matrices = group["layout"].split(direction)
        rows, columns = matrices.shape[-2:]
        scale = max(1.0, columns / rows) ** 0.5
        update = group["layout"].join(orthogonalise(matrices))
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The matrices (..., m, n) with all singular values brought close to 1 by a quintic Newton–Schulz iteration."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrices else x.mT


def build_optimizers(stage: StageConfig, learner: nn.Module) -> list[Optimizer]:
    """The optimisers of a stage for the parameters that require gradients; a group's `name` is its learning rate's."""
    layouts = _layouts(learner) if isinstance(stage, PretrainConfig) and stage.muon else {}
    others = [(name, p) for name, p in learner.named_parameters() if p.requires_grad and p not in layouts]
    table = position_table(learner.model) if getattr(stage, "position_lr", None) else None
    optimizers: list[Optimizer] = [_adamw(stage, others, table)] if others else []
    if layouts:
        optimizers.append(_muon(stage, layouts))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # what `set_lr` scales
    return optimizers


def _layouts(learner: nn.Module) -> dict[Tensor, Layout]:
    """The matrices of the linear maps in a model's layers, those that require gradients."""
    heads = learner.model.config.get_text_config().num_attention_heads
    return {
        module.weight: _layout(name, module, heads)
        for layer in repeated_layers(learner)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad
    }


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a model is a stack of: its longest list of modules that is inside no other."""
    lists, modules = [], [model]
    while modules:
        for child in modules.pop().children():
            (lists if isinstance(child, nn.ModuleList) else modules).append(child)
    return list(max(lists, key=len, default=[]))


def _layout(name: str, module: nn.Linear | Conv1D, heads: int) -> Layout:
    out_first = isinstance(module, nn.Linear)
    width, inputs = module.weight.shape if out_first else module.weight.shape[::-1]
    by_head = FUSED.get((type(module), name.rpartition(".")[2]))
    if by_head is None or width != 3 * inputs:
        return Layout(out_first)
    return Layout(out_first, parts=3, heads=heads if by_head else 1)


def _adamw(stage: StageConfig, named: list[tuple[str, Tensor]], table: nn.Embedding | None) -> AdamW:
    mechanism = [p for name, p in named if is_mechanism(name)]
    positions = [p for _, p in named if table is not None and p is table.weight]
    matrices = [p for name, p in named if not is_mechanism(name) and p.ndim >= 2 and not any(p is q for q in positions)]
    vectors = [p for name, p in named if not is_mechanism(name) and p.ndim < 2]
    groups = [
        {"name": "mechanism_lr", "params": mechanism, "lr": stage.mechanism_lr, "weight_decay": 0.0},
        {"name": "lr", "params": matrices, "lr": stage.lr, "weight_decay": stage.weight_decay},
        {"name": "position_lr", "params": positions, "lr": getattr(stage, "position_lr", None), "weight_decay": 0.0},
        {"name": "lr", "params": vectors, "lr": stage.lr, "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], betas=stage.betas, fused=True)


def _muon(stage: PretrainConfig, layouts: dict[Tensor, Layout]) -> Muon:
    groups: dict[Layout, list[Tensor]] = {}
    for weight, layout in layouts.items():
        groups.setdefault(layout, []).append(weight)
    return Muon(
        [{"name": "muon_lr", "params": weights, "layout": layout} for layout, weights in groups.items()],
        lr=stage.muon_lr,
        momentum=stage.muon_momentum,
        weight_decay=stage.weight_decay,
    )


def lr_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of the learning rate for 0-based `step` of `steps`: above 0 at the first, `final` at the last."""
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = warmup + round(schedule.constant * steps)
    if step < start:
        return 1.0
    progress = (step - start) / max(1, steps - 1 - start)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.decay == "cosine" else 1 - progress
    return schedule.final + (1 - schedule.final) * shape


def set_lr(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Sets every group's learning rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
