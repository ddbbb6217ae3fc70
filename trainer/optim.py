"""Optimisers and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from attention.mechanism import is_mechanism

from .config import PretrainConfig, ScheduleConfig, StageConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Newton–Schulz runs in float32: `torch.optim.Muon` runs it in bfloat16, which takes CPUs without bfloat16 units a
    hundred times as long. Matrices are (in, out), as GPT-2 stores them; with `parts`, each is that many matrices side
    by side (GPT-2's fused projections).

    Args:
        params: matrices, or parameter groups of them; a group may set `parts`.
        lr: learning rate; the update of an (m, n) matrix has spectral norm about lr · max(1, n/m)^½.
        momentum: of Nesterov's kind.
        weight_decay: decoupled.
        parts: see above.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        parts: int = 1,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": parts})

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
        matrices = torch.stack(direction.chunk(group["parts"], dim=1))
        rows, columns = matrices.shape[-2:]
        scale = max(1.0, columns / rows) ** 0.5
        update = torch.cat(orthogonalise(matrices).unbind(), dim=1)
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


def build_optimizers(stage: StageConfig, model: nn.Module) -> list[Optimizer]:
    """The optimisers of a stage for the parameters that require gradients; a group's `name` is its learning rate's."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = []
    if isinstance(stage, PretrainConfig) and stage.muon:
        matrices = [(name, parameter) for name, parameter in named if ".h." in name and parameter.ndim == 2]
    others = [item for item in named if item[0] not in {name for name, _ in matrices}]
    optimizers: list[Optimizer] = [_adamw(stage, others)] if others else []
    if matrices:
        optimizers.append(_muon(stage, matrices))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # what `set_lr` scales
    return optimizers


def _adamw(stage: StageConfig, named: list[tuple[str, Tensor]]) -> AdamW:
    position_lr = getattr(stage, "position_lr", None)
    mechanism = [p for name, p in named if is_mechanism(name)]
    positions = [p for name, p in named if position_lr and name.endswith("wpe.weight")]
    matrices = [p for name, p in named if not is_mechanism(name) and p.ndim >= 2 and not any(p is q for q in positions)]
    vectors = [p for name, p in named if not is_mechanism(name) and p.ndim < 2]
    groups = [
        {"name": "mechanism_lr", "params": mechanism, "lr": stage.mechanism_lr, "weight_decay": 0.0},
        {"name": "lr", "params": matrices, "lr": stage.lr, "weight_decay": stage.weight_decay},
        {"name": "position_lr", "params": positions, "lr": position_lr, "weight_decay": 0.0},
        {"name": "lr", "params": vectors, "lr": stage.lr, "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], betas=stage.betas, fused=True)


def _muon(stage: PretrainConfig, named: list[tuple[str, Tensor]]) -> Muon:
    fused = [p for name, p in named if name.endswith("c_attn.weight")]
    single = [p for name, p in named if not name.endswith("c_attn.weight")]
    return Muon(
        [{"name": "muon_lr", "params": fused, "parts": 3}, {"name": "muon_lr", "params": single}],
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
