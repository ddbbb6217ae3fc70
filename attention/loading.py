"""Reading variants and plain models, from a folder or from the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import BrokenCheckpointError, NotAModelError, WrongBaseError
from .examine import bounded, other_sizes, refuse_numbers, refusing, shape_problems
from .files import HISTORY, expanded, read_json
from .hub import HUB, HubOptions, HubSpec, Progress, download_size, pull_file
from .mechanism import is_mechanism
from .stored import CONFIG, VARIANTS, Stored, misfits, open_base, open_stored, origin, spec_of
from .variant import Variant, assemble, load_weights, read_generation_config


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint without loading its weights.

    Attributes:
        folder: where its files lie.
        method: a key of `CONFIGS`; "softmax" for a plain model.
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
        return self.config["model_type"] in VARIANTS

    @property
    def history(self) -> Path | None:
        """The file with the history of its training, one JSON object a line, if there is one."""
        path = self.folder / HISTORY
        return path if path.is_file() else None


def describe(spec: str | Path, hub: HubOptions = HUB, progress: Progress | None = None) -> Checkpoint:
    """Reads a checkpoint's description; pulls it from the Hub if it is not here. A variant's files are checked.

    Args:
        spec, hub, progress: see `locate`.

    Raises:
        CheckpointError: if it cannot be found, is damaged, or is no causal language model.
    """
    with refusing(spec):
        return _describe(open_stored(spec, hub, progress))


def _describe(stored: Stored) -> Checkpoint:
    if not stored.is_variant:
        return Checkpoint(stored.folder, "softmax", {}, None, stored.config)
    details = stored.method.to_dict()
    base = stored.base and spec_of(stored.base)
    return Checkpoint(stored.folder, details.pop("method"), details, base, stored.config)


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
    device = _device(device, base)
    with refusing(spec):
        stored = open_stored(spec, hub, progress)
    if base is not None and not stored.is_variant:
        raise ValueError(f"{spec} is a plain model; only a variant has a base")
    if base is not None and (device != base.device or dtype not in (None, base.dtype)):
        raise ValueError(f"the base is {base.dtype} on {base.device}; a variant that shares it can be nothing else")
    with refusing(spec):
        tokenizer = stored.tokenizer()
        if stored.is_variant and stored.base is not None and base is not None:
            _check_base(base, stored.base, hub, progress)
        else:
            source = stored if stored.base is None else open_base(stored.base, hub, progress)
            base = source.plain(dtype or _default_dtype(device, stored.config), device)
        model = _put_on(stored, base) if stored.is_variant else base
        read_generation_config(model, stored.folder)
        return model, tokenizer


def hub_size(spec: str | Path, hub: HubOptions = HUB) -> int:
    """Bytes that `load` would download for a checkpoint and its base; 0 for what is here already.

    Raises:
        CheckpointError: if it cannot be found.
    """
    folder = expanded(spec)
    if os.path.isdir(folder):
        size, config = 0, read_json(folder.resolve() / CONFIG)
    else:
        place = HubSpec.parse(str(spec))
        size, path = download_size(place, hub), pull_file(place, CONFIG, hub)
        folder, config = path.parent, read_json(path)
    if config.get("model_type") not in VARIANTS or config.get("base") is None:
        return size
    base = Stored(folder.resolve(), config).base
    return size if Path(base["id"]).is_absolute() else size + download_size(HubSpec.parse(spec_of(base)), hub)


def _device(device: torch.device | str | None, base: PreTrainedModel | None) -> torch.device:
    """The device to load to; the base's where "cuda" means it, too."""
    if base is None:
        return torch.device(device or "cpu")
    given = torch.device(device or base.device)
    return base.device if given.type == base.device.type and given.index is None else given


def _default_dtype(device: torch.device, config: dict[str, Any]) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise NotAModelError(f"{CONFIG} names the dtype {name!r:.100}, which is none that a model can have")
    return dtype


def _check_base(model: PreTrainedModel, base: dict[str, Any], hub: HubOptions, progress: Progress | None) -> None:
    """Compares the tensors of a base in memory with the files of the base that the variant needs.

    Raises:
        WrongBaseError: naming what differs.
    """
    if found := misfits(model):
        raise WrongBaseError(f"the base given is no plain {type(model).__name__}: {'; '.join(found)}")
    own = origin(model)
    if own is not None and Path(base["id"]).is_absolute() and not Path(base["id"]).is_dir():
        base = own | {"sha256": base["sha256"]}  # the base moved; it may still be the right one
    expected = open_base(base, hub, progress).plain(model.dtype).state_dict()
    given = model.state_dict()
    different = [
        name
        for name, tensor in expected.items()
        if name not in given or not torch.equal(given[name], tensor.to(given[name]))
    ]
    if different:
        raise WrongBaseError(f"the base given is not the variant's, {spec_of(base)}; it differs in {different}")


def _put_on(stored: Stored, base: PreTrainedModel) -> Variant:
    """The variant in a folder, around the tensors of a model in memory, which are used as they are."""
    own, given = stored.plain_config().to_dict(), base.config.to_dict()
    problems = [
        f"{CONFIG} says {name} {own[name]!r:.100}, and the base {given[name]!r:.100}"
        for name in other_sizes(own, given)
    ]
    if problems:
        raise BrokenCheckpointError(stored.folder, problems)
    weights = {name: tensor for name, tensor in stored.weights.items() if stored.base or is_mechanism(name)}
    refuse_numbers(stored.folder, {name: stored.magnitudes[name] for name in weights}, base.dtype)
    with bounded({**base.state_dict(), **weights}):
        variant = assemble(base, stored.method, stored.base, share=True)
    problems = [f"the tensor {name} is missing" for name in variant.new_parameters if name not in weights]
    places = variant.state_dict()
    problems += [f"the variant has no place for the tensor {name}" for name in weights if name not in places]
    problems += shape_problems(weights, places)
    if problems:
        raise BrokenCheckpointError(stored.folder, problems)
    own = {name: _like(tensor, base) for name, tensor in weights.items()}
    variant.config.tie_word_embeddings = stored.plain_config().tie_word_embeddings
    load_weights(variant, variant.state_dict() | own)
    variant.config.name_or_path = variant.name_or_path = str(stored.folder)
    return variant


def _like(tensor: Tensor, base: PreTrainedModel) -> Tensor:
    return tensor.to(base.device, base.dtype if tensor.is_floating_point() else tensor.dtype)
