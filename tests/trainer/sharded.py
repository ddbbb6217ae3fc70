"""The trainer under FSDP2 on CPU ranks, where Accelerate offers DDP alone; torchrun runs it with a run's options."""

import sys
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trainer.optim import repeated_layers
from trainer.train import main


def prepare(
    _: Accelerator, learner: torch.nn.Module, *optimizers: torch.optim.Optimizer
) -> tuple[torch.nn.Module | torch.optim.Optimizer, ...]:
    """What Accelerate does on GPUs: shards blocks and root, and gives optimisers the sharded parameters."""
    names = {parameter: name for name, parameter in learner.named_parameters()}
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in repeated_layers(learner):
        fully_shard(block, mesh=mesh)
    fully_shard(learner, mesh=mesh)
    sharded = dict(learner.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
    return learner, *optimizers


if __name__ == "__main__":
    Accelerator.prepare = prepare
    Accelerator.no_sync = lambda self, model: nullcontext()
    sys.exit(main(sys.argv[1:]))
