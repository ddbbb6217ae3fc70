"""From a config to what a run works with: engine, models, tokenizer, text."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

import attention
from attention.files import fingerprint

from .config import RunConfig
from .data import DataError, load_tokens, sampled_tokens

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "safetensors")


@dataclass
class Setup:
    """What a run works with.

    Attributes:
        model: what is trained: a variant, or in pretraining the base.
        base: the frozen teacher; None in pretraining.
        train, valid: streams of tokens, int32.
    """

    config: RunConfig
    accelerator: Accelerator
    model: PreTrainedModel
    base: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    train: np.ndarray
    valid: np.ndarray


def build(config: RunConfig) -> Setup:
    """Loads and checks everything that a run needs.

    Raises:
        DataError, attention.CheckpointError, ValueError: saying what cannot be used and what to do.
    """
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=None if config.precision == "auto" and not _has_bf16(config) else _precision(config),
        log_with=config.trackers or None,
        project_dir=config.output,
    )
    set_seed(config.seed)
    with accelerator.main_process_first():  # downloads and sampled text come from one process
        model, base, tokenizer = load_models(config, accelerator.device)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        check_contexts(config, model)
        source = model if base is None else base
        train, valid = load_tokens(
            config.data,
            tokenizer,
            lambda: _sample(config, source, show_progress=accelerator.is_main_process),
            show_progress=accelerator.is_main_process,
        )
    return Setup(config, accelerator, model, base, tokenizer, train, valid)


def _has_bf16(config: RunConfig) -> bool:
    return not config.cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _precision(config: RunConfig) -> str:
    return "bf16" if config.precision == "auto" else config.precision


def load_models(
    config: RunConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel | None, PreTrainedTokenizerBase]:
    """What is trained, its teacher (None in pretraining), and the tokenizer; weights in float32."""
    if config.new is not None:
        tokenizer = AutoTokenizer.from_pretrained(config.new.tokenizer)
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        options = {"vocab_size": len(tokenizer), **special, **config.new.config}
        return GPT2LMHeadModel(GPT2Config(**options)).to(device), None, tokenizer
    base, tokenizer = attention.load(config.base, device=device, dtype=torch.float32)
    if tokenizer is None:
        raise ValueError(f"{config.base} has no tokenizer, which is needed to read text")
    if config.pretrains:
        return base, None, tokenizer
    base.requires_grad_(False)
    if config.variant is not None:
        shared, _ = attention.load(config.variant, base=base)
        return attention.convert(shared, shared.mechanisms[0].config), base, tokenizer
    return attention.convert(base, attention.config_from_dict(config.attention)), base, tokenizer


def check_contexts(config: RunConfig, model: PreTrainedModel) -> None:
    """Checks every context against the model's positions.

    Raises:
        ValueError: naming all that are too long.
    """
    limit = model.config.max_position_embeddings
    contexts = {"eval.context": config.eval.context}
    for place, stage in enumerate(config.stages):
        contexts[f"stages.{place}.context"] = stage.context
        contexts[f"stages.{place}.final_context"] = stage.final_context or stage.context
    if long := [f"{name} is {value}" for name, value in contexts.items() if value > limit]:
        raise ValueError(f"the model holds {limit} tokens, but {', '.join(long)}")


def _sample(config: RunConfig, base: PreTrainedModel, *, show_progress: bool) -> np.ndarray:
    length = max(stage.context for stage in config.stages)
    return sampled_tokens(
        base,
        fingerprint({name: tensor.cpu() for name, tensor in base.state_dict().items()}),
        config.data.sampled_tokens,
        length=length,
        batch_size=config.data.sample_batch,
        seed=config.seed,
        cache=config.data.cache,
        show_progress=show_progress,
    )


def environment() -> dict[str, Any]:
    """Where and how this process runs, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def write_record(config: RunConfig, folder: Path) -> None:
    """Writes the config as it is run, and the environment, into the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


__all__ = ["DataError", "Setup", "build", "check_contexts", "environment", "load_models", "write_record"]
