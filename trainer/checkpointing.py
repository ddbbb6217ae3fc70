"""Checkpoints to resume from: complete or absent, checked on load, without pickle."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from attention.files import check, replaced, write_manifest

logger = logging.getLogger(__name__)
TENSORS, STATE = "model.safetensors", "state.json"  # names of files that a manifest covers


@dataclass
class Snapshot:
    """Everything that a run needs to go on as if it had not stopped.

    Attributes:
        weights: the tensors that the run trains, by name.
        optimizers: what the stage's optimisers remember; see `optimizer_tensors`.
        best: the best weights so far, if the run keeps them.
        rng: states of random generators, by device and process.
        state: the rest, as plain data.
    """

    weights: dict[str, Tensor]
    optimizers: dict[str, Tensor]
    best: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]


PARTS = ("weights", "optimizers", "best", "rng")


def write(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Writes `folder`/step-N beside, renames it, and then deletes all others but the last `keep` − 1 before it.

    Checkpoints of later steps go, too: a run that writes step N has skipped them as broken.

    Raises:
        CheckpointError: if the disk refuses; earlier checkpoints are untouched.
    """
    target = folder / f"step-{snapshot.state['step']:08d}"
    with replaced(target) as new:
        parts = {part: getattr(snapshot, part) for part in PARTS}
        tensors = {f"{part}/{name}": tensor for part in parts for name, tensor in parts[part].items()}
        # Not `save_file`, whose errors do not say that the disk is full.
        (new / TENSORS).write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
        (new / STATE).write_text(json.dumps(snapshot.state), encoding="utf-8")
        write_manifest(new)
    kept = [path for path in _steps(folder) if path <= target][-keep:]
    for old in set(_steps(folder)) - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return target


def read_newest(folder: Path) -> Snapshot | None:
    """The newest intact checkpoint, or None; broken ones are named in the log and left where they are."""
    for path in reversed(_steps(folder)):
        try:
            check(path)
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
            for name, tensor in load_file(path / TENSORS).items():
                part, _, key = name.partition("/")
                parts[part][key] = tensor
            return Snapshot(**parts, state=state)
        except (OSError, SafetensorError) as error:
            logger.warning("skipping a broken checkpoint: %s", error)
    return None


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def optimizer_tensors(optimizers: Sequence[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """All tensors that optimisers remember, as "optimiser/parameter/name"; on every process, whole.

    Args:
        model: whose parameters the optimisers train; it gives them their names.
    """
    names = _names(model)
    return {
        f"{_kind(optimizer)}/{names[parameter]}/{name}": whole(value)
        for optimizer in optimizers
        for parameter in _parameters(optimizer)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizers(optimizers: Sequence[Optimizer], model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives optimisers what `optimizer_tensors` took from them; learning rates and other options stay.

    Raises:
        ValueError: naming all tensors that no parameter of that name, shape and optimiser is there for.
    """
    names, memories, wrong = _names(model), [{} for _ in optimizers], []
    places = {
        (_kind(optimizer), names[parameter]): (memory, place, parameter)
        for optimizer, memory in zip(optimizers, memories, strict=True)
        for place, parameter in enumerate(_parameters(optimizer))
    }
    for key, tensor in tensors.items():
        kind, name, what = key.split("/")
        memory, place, like = places.get((kind, name), (None, None, None))
        if like is None or (tensor.ndim and tensor.shape != like.shape):
            wrong.append(key)
        else:
            memory.setdefault(place, {})[what] = shard_like(tensor, like) if tensor.ndim else tensor
    if wrong:
        raise ValueError(f"the checkpoint's optimisers trained other parameters; these do not fit: {wrong}")
    for optimizer, memory in zip(optimizers, memories, strict=True):
        optimizer.load_state_dict({"state": memory, "param_groups": optimizer.state_dict()["param_groups"]})


def trained_shapes(optimizers: Sequence[Optimizer], model: nn.Module) -> dict[str, list[int]]:
    """What each optimiser trains: shapes by "optimiser/parameter"."""
    names = _names(model)
    return {
        f"{_kind(optimizer)}/{names[parameter]}": list(parameter.shape)
        for optimizer in optimizers
        for parameter in _parameters(optimizer)
    }


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _kind(optimizer: Optimizer) -> str:
    """The name of an optimiser's class; of the one inside where Accelerate has wrapped it."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def restore_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Writes tensors into a model's own, in place, so that ties and optimisers still hold.

    Raises:
        ValueError: if the model has no tensor of a name, or one of another shape.
    """
    state = model.state_dict()
    wrong = [name for name, tensor in tensors.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        raise ValueError(f"the checkpoint is of another model; these do not fit: {wrong}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(shard_like(tensor, state[name]))


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every process that holds one must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as another is."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor
