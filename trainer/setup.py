"""From a config to what a run works with: engine, models, tokenizer, text."""

from __future__ import annotations

import copy
import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, LoggerType, get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import attention
from attention.files import CARD, expanded, fingerprint, write_file
from attention.mechanism import is_mechanism
from attention.stored import spec_of, without_copies
from attention.variant import causal_models, fuse_activations, position_limit, position_table, settle

from . import resume
from .checkpointing import restore_weights, whole
from .config import RunConfig
from .data import (
    check_length,
    check_sample,
    check_vocabulary,
    end_of_text,
    load_test_tokens,
    load_tokens,
    sampled_length,
    sampled_tokens,
)
from .documents import find_files
from .positions import extend_positions
from .samples import prompt_ids
from .signals import launcher_arguments
from .stages import trained_names
from .teacher_cache import TeacherCache, open_cache

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "safetensors")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
LONGEST_WAIT = timedelta(hours=2)  # of the other processes, while one samples, validates or saves


@dataclass
class Setup:
    """What a run works with.

    Attributes:
        model: what is trained: a variant, or in pretraining the base.
        base: the frozen teacher; None in pretraining.
        train, valid: streams of tokens, int32.
        test: name and tokens of a text to measure on once, at the end, if there is one.
        teacher_cache: what the base expects of the training text, if the config says that it is kept.
        record: what a run that goes on is compared with; see `resume.record`.
        earlier: text of the card of the variant that the run begins with, if there is one.
    """

    config: RunConfig
    accelerator: Accelerator
    model: PreTrainedModel
    base: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    train: np.ndarray
    valid: np.ndarray
    test: tuple[str, np.ndarray] | None
    record: resume.Record
    teacher_cache: TeacherCache | None = None
    earlier: str | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    def trained_tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The tensors of a model that the run changes, whole, by name; all processes must call it."""
        trained = set().union(*(trained_names(stage, self.model) for stage in self.config.stages))
        return {
            name: whole(tensor).detach()
            for name, tensor in without_copies(model, model.state_dict()).items()
            if is_mechanism(name) or name in trained
        }

    def whole_model(self) -> PreTrainedModel | None:
        """The model to measure and save: on the main process, with all its weights; elsewhere None.

        All processes must call it: where the weights are sharded, they are gathered into a copy.
        """
        if not any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            return self.model if self.is_main else None
        tensors = {name: whole(tensor) for name, tensor in self.model.state_dict().items()}
        if not self.is_main:
            return None
        model = type(self.model)(copy.deepcopy(self.model.config)).to(self.accelerator.device)
        restore_weights(model, tensors)
        return model


def build(config: RunConfig) -> Setup:
    """Loads and checks everything that a run needs.

    Raises:
        DataError, attention.CheckpointError, OSError, ValueError: saying what cannot be used and what to do.
    """
    check_trackers(config.trackers)
    check_places(config)
    find_files(config.text_files)
    torch.backends.cuda.enable_cudnn_sdp(False)  # with a mask, gradients can be NaN on Hopper (pytorch #196678)
    accelerator = Accelerator(
        cpu=config.cpu or not torch.accelerator.is_available(),  # must be said, or ranks do not find each other
        mixed_precision=_precision(config),
        log_with=config.trackers or None,
        project_dir=config.output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    check_processes(config, accelerator)
    set_seed(config.seed)
    with accelerator.main_process_first():  # one process downloads, tokenises and samples; the others find it done
        model, base, tokenizer = load_models(config, accelerator.device)
        source, is_main = model if base is None else base, accelerator.is_main_process
        if config.new is not None:
            check_finite(model)  # what is loaded was checked as it was
        check_sizes(config, model)
        check_vocabulary(tokenizer, model)
        check_prompts(config, model, tokenizer)
        fuse_activations(source)  # variants do so themselves
        if config.gradient_checkpointing:
            recompute_activations(model)
        test = load_test_tokens(config, tokenizer)
        train, valid = load_tokens(
            config.data,
            tokenizer,
            lambda: _sample(config, source, end_of_text(tokenizer), show_progress=is_main),
            seed=config.seed,
            show_progress=is_main,
        )
        check_length(len(train), config.stages)
        with accelerator.autocast():
            cache = None if base is None else _teacher_cache(config, base, train, accelerator.mixed_precision)
    if config.trackers:
        accelerator.init_trackers("efficient-attention", {"config": config.to_yaml()})
    texts = {"train": train, "valid": valid, **({} if test is None else {"test": test[1]})}
    record = resume.record(config, model, base, texts)
    if not accelerator.is_main_process:
        set_seed(config.seed + accelerator.process_index)  # or all would write, and drop, by the same random numbers
    earlier = _card_of(config.variant)
    return Setup(config, accelerator, model, base, tokenizer, train, valid, test, record, cache, earlier)


def _precision(config: RunConfig) -> str | None:
    """The precision to ask for; None leaves it to the launcher."""
    if config.precision != "auto":
        return config.precision
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 and not config.cpu else None


def recompute_activations(model: PreTrainedModel) -> None:
    """Has a model compute its activations again in the backward pass, by either name that transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def check_trackers(names: list[str]) -> None:
    """Checks that trackers can be used; Accelerate leaves out what is not installed without a word.

    Raises:
        ValueError: naming all that cannot.
    """
    registered = LOGGER_TYPE_TO_CLASS.keys() - set(LoggerType.list())
    usable = {"all", *map(str, get_available_trackers()), *registered}
    if missing := sorted(set(names) - usable):
        raise ValueError(f"trackers: {missing} are not installed or not known to Accelerate; try pip install")


def check_places(config: RunConfig) -> None:
    """Checks that a run's result would not take the place of what the run starts from.

    Raises:
        ValueError: naming what would.
    """
    results = [(Path(config.output) / name).resolve() for name in ("variant", "model")]
    starts = {"base": config.base, "variant": config.variant}
    if own := [name for name, place in starts.items() if place and expanded(place).resolve() in results]:
        raise ValueError(f"{' and '.join(own)} would be replaced by the run's own result: choose another --output")


def check_processes(config: RunConfig, accelerator: Accelerator) -> None:
    """Checks what a config asks for against how it was launched.

    Raises:
        ValueError: naming what does not go together.
    """
    problems = []
    for place, stage in enumerate(config.stages):
        smallest = min(stage.batch_size, stage.batch_size * stage.context // (stage.final_context or stage.context))
        if smallest < accelerator.num_processes:
            problems.append(
                f"stages.{place}: batches of {smallest} sequences are too few for {accelerator.num_processes} processes"
            )
    if accelerator.distributed_type in SHARDED and len(config.stages) > 1:
        problems.append("FSDP and DeepSpeed run one stage; start the next with --variant FOLDER")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if any(stage.micro_batch_size for stage in config.stages):
            problems.append("under DeepSpeed a step is one pass: leave micro_batch_size out")
        plugin = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = (
            config.stages[0].batch_size // accelerator.num_processes
        )
    if problems:
        raise ValueError("\n".join(problems))


def _card_of(spec: str | None) -> str | None:
    """The text of a checkpoint's card; None where there is none."""
    path = spec and attention.locate(spec) / CARD
    return path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else None


def load_models(
    config: RunConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel | None, PreTrainedTokenizerBase]:
    """What is trained, its teacher (None in pretraining), and the tokenizer; weights in float32."""
    if config.new is not None:
        tokenizer = AutoTokenizer.from_pretrained(config.new.tokenizer)
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        options = {"vocab_size": len(tokenizer), **special, **config.new.config}
        model = causal_models(config.new.family)[0]
        return model(CONFIG_MAPPING[config.new.family](**options)).to(device), None, tokenizer
    base, tokenizer = attention.load(config.base, device=device, dtype=torch.float32)
    if tokenizer is None:
        raise ValueError(f"{config.base} has no tokenizer, which is needed to read text")
    if config.pretrains:
        if config.positions is not None:
            extend_positions(base, config.positions, config.positions_start)
        return base, None, tokenizer
    base.requires_grad_(False)
    if config.variant is None:
        return attention.convert(base, attention.config_from_dict(config.attention)), base, tokenizer
    variant = moved(config.variant, base) if config.move else attention.load(config.variant, base=base)[0]
    options = variant.config.attention if config.attention is None else config.attention
    return with_options(variant, options), base, tokenizer


def moved(spec: str, base: PreTrainedModel) -> attention.Variant:
    """A variant's mechanisms on another base, and what its fit changed: base + (variant − its own base).

    So a fit begins near where it was when the base was trained further (task arithmetic, arXiv 2212.04089).

    Raises:
        ValueError: if the variant has no base of its own, or tensors that the other base has no places for.
    """
    old, _ = attention.load(spec)
    if not isinstance(old, attention.Variant) or old.config.base is None:
        raise ValueError(f"move needs a variant that names its base; {spec} does not")
    start = dict(attention.load(spec_of(old.config.base))[0].named_parameters())
    new = attention.convert(base, attention.config_from_dict(old.config.attention))
    own, places, problems = old.state_dict(), new.state_dict(), []
    with torch.no_grad():
        for name in filter(is_mechanism, own):
            problems += _put(name, places, own[name])
        for name, tensor in old.named_parameters():
            if not is_mechanism(name) and not torch.equal(tensor, start[name]):
                problems += _put(name, places, tensor - start[name], add=True)
    if problems:
        raise ValueError(f"{spec} cannot be moved to the base given, where other shapes or no places are: {problems}")
    settle(new)
    return new


def _put(name: str, places: dict[str, torch.Tensor], tensor: torch.Tensor, *, add: bool = False) -> list[str]:
    """Writes a tensor to its place, or adds it there; [name] if it has none."""
    place = places.get(name)
    if place is None or place.shape != tensor.shape:
        return [name]
    tensor = tensor.to(place)
    place.copy_(place + tensor if add else tensor)
    return []


def with_options(variant: PreTrainedModel, options: dict[str, Any]) -> PreTrainedModel:
    """A copy of a variant with the options given, its weights no longer the base's; it is resized where it can be.

    Raises:
        ValueError: if the weights do not fit them.
    """
    model = attention.convert(variant, attention.config_from_dict(options))
    try:
        for new, old in zip(model.mechanisms, variant.mechanisms, strict=True):
            new.load_state_dict(new.resized(old.state_dict()))
    except RuntimeError as error:
        raise ValueError(f"the variant's weights do not fit the options in attention: {error}") from None
    return model


def check_sizes(config: RunConfig, model: PreTrainedModel) -> None:
    """Checks every context against the model's positions, and the layers to train against its own.

    Raises:
        ValueError: naming all that are too long, and all layers that it has not.
    """
    limit, count, problems = position_limit(model), model.config.num_hidden_layers, []
    contexts, layers = {"eval.context": config.eval.context}, {}
    for place, stage in enumerate(config.stages):
        contexts[f"stages.{place}.context"] = stage.context
        contexts[f"stages.{place}.final_context"] = stage.final_context or 0
        layers[f"stages.{place}.layers"] = getattr(stage, "layers", None) or []
    if long := [f"{name} is {value}" for name, value in contexts.items() if limit is not None and value > limit]:
        problems.append(f"the model holds {limit} tokens, but {', '.join(long)}")
    if position_table(model) is None:
        problems += [
            f"stages.{place}.{option} needs a learned table of positions, which {model.config.model_type} has not"
            for place, stage in enumerate(config.stages)
            for option in ("position_lr", "skip_positions")
            if getattr(stage, option, None)
        ]
    if missing := [f"{name} has {n}" for name, numbers in layers.items() for n in numbers if n >= count]:
        problems.append(f"the model's layers are 0 to {count - 1}, but {', '.join(missing)}")
    if problems:
        raise ValueError("\n".join(problems))


def _teacher_cache(config: RunConfig, base: PreTrainedModel, text: np.ndarray, precision: str) -> TeacherCache | None:
    if not config.data.teacher_cache:
        return None
    folder = f"teacher-{_identity(base)[:16]}-{precision}-{config.data.teacher_error:g}"
    return open_cache(Path(config.data.cache) / folder, base, text, config.data.teacher_error)


def _identity(model: PreTrainedModel) -> str:
    return fingerprint({name: tensor.cpu() for name, tensor in model.state_dict().items()})


def check_finite(model: PreTrainedModel) -> None:
    """Checks that no random weight of a new model is NaN or infinite, as its config may ask for.

    Raises:
        ValueError: naming the tensors.
    """
    if wrong := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"the new model has weights that are NaN or infinite: {resume.some(wrong)}; what does new.config ask for?"
        )


def check_prompts(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that every prompt leaves the model room to write.

    Raises:
        ValueError: naming all that do not.
    """
    if (limit := position_limit(model)) is None:
        return
    lengths = {place: prompt_ids(tokenizer, prompt).shape[1] for place, prompt in enumerate(config.samples.prompts)}
    if long := [f"samples.prompts.{place} has {length}" for place, length in lengths.items() if length >= limit]:
        raise ValueError(
            f"the model holds {limit} tokens, prompt and continuation together, but {', '.join(long)}: shorten them"
        )


def _sample(config: RunConfig, base: PreTrainedModel, eos: int, *, show_progress: bool) -> np.ndarray:
    check_sample(config)
    return sampled_tokens(
        base,
        _identity(base),
        config.data.sampled_tokens,
        length=sampled_length(config),
        batch_size=config.data.sample_batch,
        seed=config.seed,
        cache=config.data.cache,
        start=eos,
        show_progress=show_progress,
    )


def write_record(config: RunConfig, folder: Path) -> None:
    """Writes the config as it is run, and the environment, into the run's folder.

    Raises:
        OSError: if the disk refuses; what was there before is untouched.
    """
    write_file(folder / "config.yaml", config.to_yaml().encode())
    write_file(folder / "environment.json", (json.dumps(environment(), indent=2, ensure_ascii=False) + "\n").encode())


def environment() -> dict[str, Any]:
    """Where and how this process runs, for the record."""
    return {
        "command": command(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


@cache  # the launcher may be gone later
def command() -> str:
    """How this was started, the launcher's options included."""
    launched = launcher_arguments()
    return shlex.join(["python", *sys.orig_argv[1:]] if launched is None else ["accelerate", "launch", *launched])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this code, where it is a clone; marked if files differ from it."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
