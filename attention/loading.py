"""Reading variants and plain models, from a folder or from the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .convert import load_weights, origin
from .errors import BrokenCheckpointError, MissingCheckpointError, NotAModelError, WrongBaseError
from .files import HISTORY, check, existing, fingerprint, read_json, read_weights, weight_files
from .gpt2 import GPT2VariantConfig, GPT2VariantLMHeadModel
from .hub import HUB, HubOptions, HubSpec, Progress, cached_origin, download_size, pull, pull_file
from .mechanism import ConfigError, MechanismConfig
from .registry import config_from_dict


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint without loading its weights.

    Attributes:
        folder: where its files lie.
        method: a key of `METHODS`; "softmax" for a plain model.
        options: the method's options.
        base: what `load` takes to get the base, the same text for all variants of one base; None for a plain model
            and for a variant that carries all weights itself.
        config: the content of config.json.
    """

    folder: Path
    method: str
    options: dict[str, Any]
    base: str | None
    config: dict[str, Any] = field(repr=False)

    @property
    def is_variant(self) -> bool:
        return self.config["model_type"] == GPT2VariantConfig.model_type

    @property
    def history(self) -> Path | None:
        """The file with the history of its training, one JSON object a line, if there is one."""
        path = self.folder / HISTORY
        return path if path.is_file() else None


def locate(spec: str | Path, hub: HubOptions = HUB, progress: Progress | None = None) -> Path:
    """The folder of a checkpoint: a local one if it exists, otherwise pulled from the Hub.

    Args:
        spec: a folder, or "user/repo[/subfolder][@revision]".
        hub: endpoint, token and cache of the Hub.
        progress: called with bytes done and bytes expected during a download.

    Raises:
        CheckpointError: of the class that says why there is none.
    """
    folder = existing(Path(spec).expanduser().absolute())
    if folder.is_dir():
        return folder.resolve()
    if isinstance(spec, Path) or str(spec).startswith((".", "/", "~")):
        raise MissingCheckpointError(f"there is no folder {spec}")
    return pull(HubSpec.parse(spec), hub, progress)


def describe(spec: str | Path, hub: HubOptions = HUB, progress: Progress | None = None) -> Checkpoint:
    """Reads a checkpoint's description; pulls it from the Hub if it is not here. A variant's files are checked.

    Args:
        spec, hub, progress: see `locate`.

    Raises:
        CheckpointError: if it cannot be found, is damaged, or is no causal language model.
    """
    folder = locate(spec, hub, progress)
    if not (folder / "config.json").is_file():
        raise NotAModelError(f"{folder} has no config.json, so it is not a model")
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind == GPT2VariantConfig.model_type:
        check(folder)
        details = _mechanism(folder, config).to_dict()
        base = resolve_base(folder, config.get("base"))
        return Checkpoint(folder, details.pop("method"), details, base and spec_of(base), config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise NotAModelError(f"{folder} is neither a variant nor a causal language model: its model_type is {kind!r}")
    return Checkpoint(folder, "softmax", {}, None, config)


def load(
    spec: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    base: PreTrainedModel | None = None,
    hub: HubOptions = HUB,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A variant, or a plain causal language model, and its tokenizer. No code of a checkpoint is ever run.

    Args:
        spec: a folder, or "user/repo[/subfolder][@revision]" on the Hub; a folder that exists wins.
        device: the CPU by default.
        dtype: float32 on a CPU by default, elsewhere what the checkpoint was made in.
        base: the variant's base, already loaded: the variant then shares its tensors, dtype and device. Not used
            by a variant that carries all weights itself.
        hub, progress: see `locate`.

    Returns:
        The model in evaluation mode; the tokenizer, None where the checkpoint has none.

    Raises:
        CheckpointError: of the class that says what is wrong; nothing that is damaged or does not fit is loaded.
        ValueError: if `base` contradicts the rest of the arguments.
    """
    found = describe(spec, hub, progress)
    tokenizer = read_tokenizer(found.folder)
    device = _device(device, base)
    if not found.is_variant:
        if base is not None:
            raise ValueError(f"{spec} is a plain model; only a variant has a base")
        return _load_plain(found, device, dtype or _default_dtype(device, found.config)), tokenizer
    if base is not None and (device != base.device or dtype not in (None, base.dtype)):
        raise ValueError(f"the base is {base.dtype} on {base.device}; a variant that shares it can be nothing else")
    dtype = base.dtype if base is not None else dtype or _default_dtype(device, found.config)
    config = read_config(found.folder)
    weights = read_weights(found.folder)
    if config.base is not None:
        if base is None:
            shared = gpt2_names(_base_weights(config.base, hub, progress))
        else:
            shared = _shared_weights(base, config.base, hub, progress)
        weights = shared | weights
    return _assemble(found.folder, config, weights, device, dtype), tokenizer


def hub_size(spec: str | Path, hub: HubOptions = HUB) -> int:
    """Bytes that `load` would download for a checkpoint and its base; 0 for what is here already.

    Raises:
        CheckpointError: if it cannot be found.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir():
        size, config = 0, read_json(folder.resolve() / "config.json")
    else:
        place = HubSpec.parse(str(spec))
        size, path = download_size(place, hub), pull_file(place, "config.json", hub)
        folder, config = path.parent, read_json(path)
    if config.get("model_type") != GPT2VariantConfig.model_type or config.get("base") is None:
        return size
    base = resolve_base(folder.resolve(), config.get("base"))
    return size if Path(base["id"]).is_absolute() else size + download_size(HubSpec.parse(spec_of(base)), hub)


def read_config(folder: Path) -> GPT2VariantConfig:
    """A variant's config; its base's path made absolute."""
    config = GPT2VariantConfig.from_pretrained(folder)
    config.base = resolve_base(folder, config.base)
    return config


def resolve_base(folder: Path, base: dict[str, Any] | None) -> dict[str, Any] | None:
    """`GPT2VariantConfig.base` with its path made absolute; one that leads through the Hub's cache becomes a name."""
    if base is None or not base["id"].startswith("."):
        return base
    path = Path(os.path.normpath(folder / base["id"]))
    place = None if path.is_dir() else cached_origin(path)
    if place is None:
        return base | {"id": str(path)}
    return base | {"id": place.name, "revision": place.revision}


def spec_of(base: dict[str, Any]) -> str:
    """What `load` takes to get the base that a resolved `GPT2VariantConfig.base` names."""
    return f"{base['id']}@{base['revision']}" if base.get("revision") else base["id"]


def full_weights(folder: Path, hub: HubOptions) -> dict[str, Tensor]:
    """All weights of an intact variant, the base's included, on the CPU as stored.

    Raises:
        WrongBaseError: if its base is missing or another.
    """
    config, weights = read_config(folder), read_weights(folder)
    if config.base is not None:
        weights = gpt2_names(_base_weights(config.base, hub)) | weights
    return _tied(weights, config.tie_word_embeddings)


def pretrained_arguments(
    name: str | os.PathLike, config: GPT2VariantConfig | None, kwargs: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Turns arguments of `from_pretrained` into the folder they mean and arguments that need no files."""
    rest = dict(kwargs)
    token = rest.pop("token", None)
    hub = HubOptions(
        api=HfApi(token=token),
        cache_dir=rest.pop("cache_dir", None),
        local_files_only=rest.pop("local_files_only", False),
        force_download=rest.pop("force_download", False),
    )
    revision, subfolder = rest.pop("revision", None), rest.pop("subfolder", "")
    folder = existing(Path(name, subfolder).absolute())
    if not folder.is_dir():
        place = HubSpec.parse(str(name))
        folder = pull(replace(place, subfolder=subfolder or place.subfolder, revision=revision), hub)
    folder = folder.resolve()
    if not describe(folder).is_variant:
        raise NotAModelError(f"{name} is a plain model, not a variant; attention.convert makes one of it")
    if config is None:
        config, rest = GPT2VariantConfig.from_pretrained(folder, return_unused_kwargs=True, **rest)
    config.base = resolve_base(folder, config.base)
    return folder, {**rest, "config": config, "state_dict": full_weights(folder, hub)}


def gpt2_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A GPT-2 file's tensors under the names of `GPT2LMHeadModel`: old files lack the prefix and hold masks."""
    return {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in weights.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, None if it holds none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ValueError as error:
        raise NotAModelError(f"the tokenizer in {folder} cannot be read: {error}") from error


def _mechanism(folder: Path, config: dict[str, Any]) -> MechanismConfig:
    try:
        return config_from_dict(config.get("attention") or {})
    except ConfigError as error:
        raise NotAModelError(f"{folder} was made by another version of this package: {error}") from error


def _device(device: torch.device | str | None, base: PreTrainedModel | None) -> torch.device:
    """The device to load to; the base's where "cuda" means it, too."""
    if base is None:
        return torch.device(device or "cpu")
    given = torch.device(device or base.device)
    return base.device if given.type == base.device.type and given.index is None else given


def _load_plain(found: Checkpoint, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    weight_files(found.folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            found.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError) as error:
        raise BrokenCheckpointError(found.folder, [f"its weights cannot be read: {error}"]) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise NotAModelError(f"{found.folder} lacks weights of a {type(model).__name__}, or has other sizes: {wrong}")
    return model.to(device)


def _default_dtype(device: torch.device, config: dict[str, Any]) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def _base_weights(base: dict[str, Any], hub: HubOptions, progress: Progress | None = None) -> dict[str, Tensor]:
    """The base's tensors as stored, after their fingerprint was compared with the one in the variant's config."""
    spec = spec_of(base)
    try:
        folder = Path(spec) if Path(spec).is_absolute() else pull(HubSpec.parse(spec), hub, progress)
        weights = read_weights(folder)
    except (MissingCheckpointError, NotAModelError) as error:
        raise WrongBaseError(
            f"the variant needs its base, {spec}, which is not there ({error}); put it there, or save the variant "
            "again with self_contained=True"
        ) from error
    if (found := fingerprint(weights)) != base["sha256"]:
        raise WrongBaseError(
            f"{spec} has other weights than the base that the variant was made from (SHA-256 {found[:12]}... instead "
            f"of {base['sha256'][:12]}...); a variant works with its own base only"
        )
    return weights


def _shared_weights(
    model: PreTrainedModel, base: dict[str, Any], hub: HubOptions, progress: Progress | None
) -> dict[str, Tensor]:
    """The tensors of a base in memory, after they were compared with the files of the base that the variant needs."""
    own = origin(model)
    if own is not None and Path(base["id"]).is_absolute() and not Path(base["id"]).is_dir():
        base = own | {"sha256": base["sha256"]}  # the base moved; it may still be the right one
    expected = gpt2_names(_base_weights(base, hub, progress))
    given = {name: tensor for name, tensor in model.state_dict().items() if ".mechanism." not in name}
    different = [
        name
        for name, tensor in expected.items()
        if name not in given or not torch.equal(given[name], tensor.to(given[name]))
    ]
    if different:
        raise WrongBaseError(f"the base given is not the variant's, {spec_of(base)}; it differs in {different}")
    return given


def _assemble(
    folder: Path, config: GPT2VariantConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> GPT2VariantLMHeadModel:
    """A variant around the given tensors, which are used as they are where dtype and device are right."""
    with no_init_weights():
        variant = GPT2VariantLMHeadModel(config).to(device=device, dtype=dtype)
    missing = [name for name in variant.new_parameters if name not in weights]
    if missing:
        raise BrokenCheckpointError(folder, [f"the tensor {name} is missing" for name in missing])
    weights = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in weights.items()
    }
    load_weights(variant, _tied(weights, config.tie_word_embeddings))
    read_generation_config(variant, folder)
    config.name_or_path = str(folder)
    return variant.eval()


def _tied(weights: dict[str, Tensor], tie: bool) -> dict[str, Tensor]:
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]} if tie else weights


def read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Gives a model the generation defaults that its folder holds."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
