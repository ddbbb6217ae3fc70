"""Writing variants to folders."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from filecmp import cmp
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import CheckpointError
from .examine import other_sizes
from .files import (
    CARD,
    HISTORY,
    OWN_WEIGHTS,
    SHARD_SIZE,
    expanded,
    replaced,
    write_json,
    write_manifest,
    write_weights,
)
from .hub import HUB, HubOptions, cached_origin
from .stored import VARIANTS, Stored, is_tied, misfits, open_stored, origin, spec_of, without_copies

METADATA = re.compile(r"---\n.*?^---\n", re.DOTALL | re.MULTILINE)  # at a card's beginning
RESULTS = re.compile(r"^model-index:.*\n(?:[ -].*\n)*", re.MULTILINE)
OTHER_WEIGHTS = "> This card, its figures included, is of weights that lay in this folder before."
logger = logging.getLogger(__name__)


def save(
    variant: PreTrainedModel,
    folder: str | Path,
    *,
    base: PreTrainedModel | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = torch.float16,
    card: object | None = None,
    history: str | Path | Iterable[Mapping[str, Any]] | None = None,
    self_contained: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    hub: HubOptions = HUB,
) -> None:
    """Writes a variant to a folder, complete or not at all; an older one in its place is lost only after that.

    Only tensors that differ from the base's files are written, and the mechanism's. A variant whose base has no
    files, or has them no longer, is written with all of its weights.

    Args:
        base: where the base is (a folder, a name on the Hub, or the model loaded from there), if not where
            `convert` found it.
        tokenizer: the base's own by default.
        dtype: what float32 weights are rounded to on disk, unless they exceed its range; None keeps float32. What
            is loaded again differs from `variant` by that rounding: in float16 by at most 2^-11 of each weight,
            or 2^-25 where that is more.
        card: the model card, any object whose text is one; without it that of an older variant in the folder stays,
            and says of other weights than its own that its figures are not theirs.
        history: of the training: a file with a JSON object a line, or the objects.
        self_contained: write all weights, so that no base is needed.
        state_dict: the variant's weights where `variant` holds only a part of them, as under FSDP or ZeRO.
        max_shard_size: of a weights file, in bytes or as a string; a larger tensor gets a file of its own.
        hub: how to find a base on the Hub.

    Raises:
        CheckpointError: if the model is no variant or its weights are no more (quantized, with adapters), the folder
            holds something else, or the disk refuses.
    """
    if getattr(variant, "config", None) is None or variant.config.model_type not in VARIANTS:
        raise CheckpointError(
            f"{type(variant).__name__} is no variant: make one with attention.convert, or write a model that is to "
            "stay as it is with its own save_pretrained"
        )
    folder = expanded(folder).absolute()
    source = _find_base(variant, base, hub)
    _spare_base(variant, source, folder)
    if tokenizer is None and source is not None:
        tokenizer = _tokenizer_of(source)
    with replaced(folder) as new:
        write_model(new, variant, None if self_contained else source, folder, dtype, state_dict, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if card is not None:
            (new / CARD).write_text(str(card), encoding="utf-8")
        if history is not None:
            _write_history(new / HISTORY, history)
        _keep_card(folder, new)
        write_manifest(new)


def save_model(
    variant: PreTrainedModel,
    folder: str | Path,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> None:
    """What `save_pretrained` does: config and weights, in the variant's own dtype; the tokenizer saves itself."""
    folder = expanded(folder).absolute()
    source = _find_base(variant, None, HUB)
    _spare_base(variant, source, folder)
    with replaced(folder) as new:
        write_model(new, variant, source, folder, None, state_dict, max_shard_size)
        _keep_card(folder, new)
        write_manifest(new)


def write_model(
    target: Path,
    variant: PreTrainedModel,
    source: Stored | None,
    home: Path,
    dtype: torch.dtype | None,
    state_dict: Mapping[str, Tensor] | None,
    max_shard_size: int | str,
) -> None:
    """Writes weights and configs into `target`, as a folder that will lie at `home`; `source` is the base.

    Raises:
        CheckpointError: if the weights are not those that such a variant is built with.
    """
    if found := misfits(variant, state_dict):
        raise CheckpointError(
            f"{home} was not written: its weights could not be read as a variant's again ({'; '.join(found)}). Save "
            "before quantizing or replacing layers; adapters are saved by their own save_pretrained, or merged first"
        )
    weights = without_copies(variant, variant.state_dict() if state_dict is None else state_dict)
    config = copy.deepcopy(variant.config)
    config.base = None
    config.tie_word_embeddings = is_tied(variant)
    if not variant.is_remote_code():
        config.__dict__.pop("auto_map", None)  # names code that `push` adds
    if source is not None and (others := other_sizes(config.to_dict(), source.plain_config().to_dict())):
        logger.warning("the variant has other sizes than its base, so all weights are saved: %s", ", ".join(others))
        source = None
    if source is not None:
        config.base = {**_base_name(source.folder, home), "sha256": source.fingerprint}
        weights = difference(weights, source.plain(variant.dtype).state_dict())
    write_weights(target, {name: _stored(tensor, dtype) for name, tensor in weights.items()}, max_shard_size)
    config.architectures = [type(variant).__name__]
    config.dtype = str(variant.dtype).removeprefix("torch.")
    config.versions = {"torch": torch.__version__, "safetensors": safetensors.__version__}
    write_json(target / "config.json", json.loads(config.to_json_string()))
    variant.generation_config.save_pretrained(target)


def difference(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `base` lacks or has with other values, compared in the dtype of `weights`."""
    return {
        name: tensor
        for name, tensor in weights.items()
        if name not in base or not torch.equal(tensor.cpu(), base[name].to(tensor.dtype))
    }


def _find_base(variant: PreTrainedModel, base: PreTrainedModel | str | Path | None, hub: HubOptions) -> Stored | None:
    """The base as stored; None, with a warning where one was expected, if there is none."""
    if isinstance(base, PreTrainedModel):
        place = origin(base)
        spec = None if place is None else spec_of(place)
    elif base is not None:
        spec = base
    else:
        spec = None if variant.config.base is None else spec_of(variant.config.base)
    if spec is None:
        return None
    try:
        return open_stored(spec, hub)
    except CheckpointError as error:
        logger.warning("the base of the variant cannot be read, so all weights are saved: %s", error)
        return None


def _spare_base(variant: PreTrainedModel, source: Stored | None, folder: Path) -> None:
    """Refuses to write where the base lies, by whatever name, also if it cannot be read at this moment.

    Raises:
        CheckpointError: if `folder` is the base.
    """
    places = [] if source is None else [source.folder]
    if variant.config.base is not None:
        places.append(Path(variant.config.base["id"]))
    if any(place.is_absolute() and os.path.realpath(place) == os.path.realpath(folder) for place in places):
        raise CheckpointError(
            f"{folder} is the variant's base, which saving there would destroy; choose another folder"
        )


def _tokenizer_of(source: Stored) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer; None, with a warning, where it cannot be read: the weights are worth saving without."""
    try:
        return source.tokenizer()
    except CheckpointError as error:
        logger.warning("the variant is saved without a tokenizer: %s", error)
        return None


def _base_name(source: Path, home: Path) -> dict[str, str | None]:
    """How a variant that lies at `home` names the base in the folder `source`."""
    place = cached_origin(source)
    if place is not None:
        return {"id": place.name, "revision": place.revision}
    path = Path(os.path.relpath(source, home.resolve())).as_posix()
    return {"id": path if path.startswith(".") else f"./{path}", "revision": None}


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy as it goes to disk: float32 in `dtype`, unless that makes a finite number infinite."""
    tensor = tensor.detach().to("cpu", copy=True)
    if dtype is None or tensor.dtype != torch.float32:
        return tensor
    rounded = tensor.to(dtype)
    return tensor if (tensor.isfinite() & ~rounded.isfinite()).any() else rounded


def _keep_card(old: Path, new: Path) -> None:
    """Takes over an older variant's card where no new one was written; of other weights it claims nothing."""
    if (new / CARD).exists() or not (old / CARD).is_file():
        return
    text = (old / CARD).read_text(encoding="utf-8", errors="surrogateescape")
    before, after = _own_weights(old), _own_weights(new)
    if before and (before.keys() != after.keys() or not all(cmp(before[name], after[name], False) for name in before)):
        text = _without_claims(text)
    (new / CARD).write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def _own_weights(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if OWN_WEIGHTS.fullmatch(path.name)}


def _without_claims(card: str) -> str:
    """A card whose figures are said to be another variant's, and no longer stand in its metadata."""
    metadata = METADATA.match(card)
    head = "" if metadata is None else RESULTS.sub("", metadata[0])
    body = card.removeprefix("" if metadata is None else metadata[0])
    return card if body.lstrip("\n").startswith(OTHER_WEIGHTS) else f"{head}\n{OTHER_WEIGHTS}\n\n{body.lstrip()}"


def _write_history(path: Path, history: str | Path | Iterable[Mapping[str, Any]]) -> None:
    if isinstance(history, str | Path):
        shutil.copyfile(history, path)
    else:
        path.write_text("".join(json.dumps(dict(row)) + "\n" for row in history), encoding="utf-8", newline="\n")
