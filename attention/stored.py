"""A checkpoint as it lies in a folder: opened once, checked once, its base found and verified once a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .errors import BrokenCheckpointError, MissingCheckpointError, NotAModelError, WrongBaseError
from .examine import bounded, check_memory, config_problems, largest, refuse_numbers, refusing, shape_problems
from .files import (
    MANIFEST,
    OWN_WEIGHTS,
    check,
    existing,
    expanded,
    fingerprint,
    has_tokenizer,
    needs_sentencepiece,
    parse_json,
    parse_weights,
    read_json,
    read_weights,
)
from .hub import HUB, HubOptions, HubSpec, Progress, cached_origin, is_complete, pull
from .mechanism import ConfigError, MechanismConfig, is_mechanism
from .registry import config_from_dict

CONFIG = "config.json"
VARIANT = "attention-variant"
VARIANTS = {VARIANT: None, "gpt2-variant": "gpt2"}  # model types of variants, and the family of those that name none
# transformers switches initialisation and tying off for the whole process while it builds a model, not for a thread.
building = threading.RLock()


def locate(spec: str | Path, hub: HubOptions = HUB, progress: Progress | None = None) -> Path:
    """The folder of a checkpoint: a local one if it exists, otherwise pulled from the Hub.

    Args:
        spec: a folder, or "user/repo[/subfolder][@revision]".
        hub: endpoint, token and cache of the Hub.
        progress: called with bytes done and bytes expected during a download.

    Raises:
        CheckpointError: of the class that says why there is none.
    """
    folder = existing(expanded(spec).absolute())
    if os.path.isdir(folder):  # False for names that no disk takes, where Path.is_dir raises
        return folder.resolve()
    if isinstance(spec, Path) or str(spec).startswith((".", "/", "~")):
        raise MissingCheckpointError(f"there is no folder {spec}")
    return pull(HubSpec.parse(spec), hub, progress)


@dataclass
class Stored:
    """A variant or a plain model in a folder.

    Attributes:
        folder: where its files lie.
        config: the content of config.json.
        weights: its own tensors by name, as stored.
    """

    folder: Path
    config: dict[str, Any]
    _weights: dict[str, Tensor] | None = field(default=None, repr=False)
    _counted: int | None = field(default=None, repr=False)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return read_weights(self.folder) if self._weights is None else self._weights

    @cached_property
    def magnitudes(self) -> dict[str, float]:
        """The largest magnitude in each tensor, NaN where one holds NaN; one pass over all weights."""
        return {name: largest(tensor) for name, tensor in self.weights.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tensors, see `files.fingerprint`."""
        return fingerprint(self.weights)

    def __post_init__(self) -> None:
        problems = config_problems(self.config)
        for name in ("model_type", "family"):
            if not isinstance(self.config.get(name), str | None):
                problems.append(f"{name} is {self.config[name]!r:.100}; it must be a name")
        if problems:
            raise BrokenCheckpointError(self.folder, [f"{CONFIG}: {problem}" for problem in problems])

    @property
    def is_variant(self) -> bool:
        return self.config.get("model_type") in VARIANTS

    @property
    def family(self) -> str:
        """The `model_type` of the model, of a variant's base for a variant."""
        kind = self.config.get("model_type")
        return (VARIANTS[kind] or self.config.get("family")) if kind in VARIANTS else kind

    @cached_property
    def method(self) -> MechanismConfig:
        """The attention of a variant."""
        content = self.config.get("attention") or {}
        if not isinstance(content, dict):
            raise NotAModelError(
                f"{self.folder / CONFIG} does not say what attention the variant has: {content!r:.100}"
            )
        with refusing(self.folder / CONFIG):
            try:
                return config_from_dict(content)
            except ConfigError as error:
                raise NotAModelError(f"{self.folder} was made by another version of this package: {error}") from error

    @cached_property
    def base(self) -> dict[str, Any] | None:
        """`base` of a variant's config with its path made absolute; through the Hub's cache it becomes a name."""
        base = self.config.get("base")
        if base is None:
            return None
        kinds = {"id": str, "revision": str | None, "sha256": str}
        if not isinstance(base, dict) or not all(isinstance(base.get(name), kind) for name, kind in kinds.items()):
            raise NotAModelError(f"{self.folder / CONFIG} does not name the variant's base: {base!r:.200}")
        if not base["id"].startswith("."):
            return base
        path = Path(os.path.normpath(self.folder / base["id"]))
        place = None if os.path.isdir(path) else cached_origin(path)
        if place is None:
            return base | {"id": str(path)}
        return base | {"id": place.name, "revision": place.revision}

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer in the folder, None if it holds none."""
        if not has_tokenizer(self.folder):
            if not is_complete(self.folder):
                raise NotAModelError(
                    f"the cache holds no tokenizer of {cached_origin(self.folder)}, and no list of what the Hub has; "
                    "load it once with the network, and without HF_HUB_OFFLINE"
                )
            return None
        with refusing(f"the tokenizer in {self.folder}"):
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
            except Exception as error:
                if not needs_sentencepiece(self.folder):
                    raise
                raise NotAModelError(  # what transformers says is that tiktoken is missing
                    f"the tokenizer in {self.folder} is of SentencePiece: pip install sentencepiece protobuf"
                ) from error
            names = {*tokenizer.vocab_files_names.values()} - {"tokenizer_config.json"}
            if names and not any((self.folder / name).is_file() for name in names | {"tokenizer.json"}):
                raise NotAModelError(
                    f"{self.folder} holds the settings of a {type(tokenizer).__name__} and none of its files "
                    f"({', '.join(sorted(names))}); copy or download them, too"
                )
        return tokenizer

    def plain_config(self) -> PreTrainedConfig:
        """The config of the model without a mechanism."""
        content = deepcopy(self.config)
        for name in ("model_type", "family", "attention", "base", "versions", "auto_map"):
            content.pop(name, None)
        with refusing(f"{self.folder / CONFIG}, as one of {self.family!r},"):
            return CONFIG_MAPPING[self.family].from_dict(content)

    def plain(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The model without a mechanism, from its own tensors alone, in evaluation mode.

        Raises:
            CheckpointError: if the tensors are not those of such a model.
        """
        with refusing(self.folder):
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config := self.plain_config())]
            model_class = model_class[0] if isinstance(model_class, tuple) else model_class
            weights = {name: tensor for name, tensor in self.weights.items() if not is_mechanism(name)}
            stored = sum(tensor.nbytes for tensor in weights.values())
            check_memory(stored + self._elements(model_class) * dtype.itemsize, device, self.folder)
            # Copies: what is stored is kept for the next model of this folder, and whoever trains this one changes it.
            weights = {name: tensor.clone() for name, tensor in weights.items()}
            with building, _without_bars():
                model, report = model_class.from_pretrained(
                    None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
                )
        left_out = set(report["unexpected_keys"])
        refuse_numbers(self.folder, {n: m for n, m in self.magnitudes.items() if n not in left_out}, dtype)
        if report["missing_keys"] or report["mismatched_keys"]:
            wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            raise NotAModelError(
                f"{self.folder} lacks weights of a {model_class.__name__}, or has other sizes: {wrong}"
            )
        model.config.name_or_path = model.name_or_path = str(self.folder)
        with refusing(self.folder):
            return model.to(device).eval()

    def _elements(self, model_class: type[PreTrainedModel]) -> int:
        """How many numbers the model has, by a copy of it without memory, whose tensors are those of the files.

        Raises:
            BrokenCheckpointError: naming the tensors that have other sizes than the config asks for.
        """
        if self._counted is None:
            weights = {name: tensor for name, tensor in self.weights.items() if not is_mechanism(name)}
            with building, bounded(weights), torch.device("meta"), no_init_weights():
                skeleton = model_class(self.plain_config())
            problems = shape_problems(weights, skeleton.state_dict(), skeleton.base_model_prefix)
            if problems:
                raise BrokenCheckpointError(self.folder, problems)
            self._counted = sum(each.numel() for each in (*skeleton.parameters(), *skeleton.buffers()))
        return self._counted


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers; what they would show is over in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def open_stored(
    spec: str | Path,
    hub: HubOptions = HUB,
    progress: Progress | None = None,
    *,
    subfolder: str = "",
    revision: str | None = None,
) -> Stored:
    """Opens a checkpoint, pulled from the Hub if it is not here; a variant's files are compared with its manifest.

    Args:
        spec, hub, progress: see `locate`.
        subfolder, revision: of the spec, where they are not part of it.

    Raises:
        CheckpointError: if it cannot be found, is damaged, or is no causal language model.
    """
    folder = existing(expanded(Path(spec, subfolder)).absolute())
    if os.path.isdir(folder) or not (subfolder or revision):
        folder = locate(Path(spec, subfolder) if subfolder else spec, hub, progress)
    else:
        place = HubSpec.parse(str(spec))
        place = HubSpec(place.repo_id, subfolder or place.subfolder, revision or place.revision)
        folder = pull(place, hub, progress)
    return _open(folder.resolve())


def _open(folder: Path) -> Stored:
    if (folder / MANIFEST).is_file():
        stored = _open_checked(folder)
        if stored.is_variant:
            return stored
    stored = _open_plain(folder, _signature(folder))
    if stored.is_variant:
        check(folder)  # names the manifest that is missing
    if stored.family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise NotAModelError(
            f"{folder} is neither a variant nor a causal language model: its model_type is {stored.family!r}"
        )
    return stored


def _open_checked(folder: Path) -> Stored:
    """A folder whose files are those of its manifest, each of them read once."""
    tensors: dict[str, Tensor] = {}
    configs: dict[str, bytes] = {}

    def take(name: str, content: bytes) -> None:
        if name == CONFIG:
            configs[name] = content
        elif OWN_WEIGHTS.fullmatch(name) and name.endswith(".safetensors"):
            tensors.update(parse_weights(folder / name, content))

    check(folder, take)
    return Stored(folder, parse_json(folder / CONFIG, configs.get(CONFIG, b"")), tensors)


@lru_cache(maxsize=4)
def _open_plain(folder: Path, signature: tuple) -> Stored:
    """A plain model's folder; kept while its files are those of the signature, so that it is read and verified once."""
    return Stored(folder, read_json(folder / CONFIG))


def _signature(folder: Path) -> tuple:
    """What changes when files of a folder do: name, size and time of each that is read."""
    if not (folder / CONFIG).is_file():
        raise NotAModelError(f"{folder} has no {CONFIG}, so it is not a model")
    paths = sorted(path for path in folder.iterdir() if path.name == CONFIG or OWN_WEIGHTS.fullmatch(path.name))
    return tuple((path.name, (stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ino) for path in paths)


def spec_of(base: Mapping[str, Any]) -> str:
    """What `load` takes to get the base that a resolved `VariantConfig.base` names."""
    return f"{base['id']}@{base['revision']}" if base.get("revision") else base["id"]


def open_base(base: Mapping[str, Any], hub: HubOptions = HUB, progress: Progress | None = None) -> Stored:
    """A variant's base, after its fingerprint was compared with the one in the variant's config.

    Raises:
        WrongBaseError: if it is missing or another.
    """
    spec = spec_of(base)
    try:
        stored = _open((Path(spec) if Path(spec).is_absolute() else pull(HubSpec.parse(spec), hub, progress)).resolve())
        found = stored.fingerprint
    except (MissingCheckpointError, NotAModelError) as error:
        raise WrongBaseError(
            f"the variant needs its base, {spec}, which is not there ({error}); put it there, or save the variant "
            "again with self_contained=True"
        ) from error
    if found != base["sha256"]:
        raise WrongBaseError(
            f"{spec} has other weights than the base that the variant was made from (SHA-256 {found[:12]}... instead "
            f"of {base['sha256'][:12]}...); a variant works with its own base only"
        )
    return stored


def whole_weights(stored: Stored, hub: HubOptions = HUB) -> dict[str, Tensor]:
    """All weights of a variant under the names of its model, the base's included, on the CPU as stored.

    Raises:
        WrongBaseError: if its base is missing or another.
    """
    source = stored if stored.base is None else open_base(stored.base, hub)
    dtypes = {tensor.dtype for tensor in source.weights.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    plain = source.plain(dtype)
    weights = without_copies(plain, plain.state_dict()) | stored.weights
    output = matrix_names(plain)[1]
    if stored.plain_config().tie_word_embeddings and output not in stored.weights:
        weights.pop(output, None)  # tied in the variant, though not in its base
    return weights


def origin(model: PreTrainedModel) -> dict[str, Any] | None:
    """Where a base's weights came from, as `VariantConfig.base` says it; None for a model made in memory.

    For a variant, the base that it was made from.
    """
    if model.config.model_type in VARIANTS:
        return model.config.base
    name = model.config.name_or_path
    if not name:
        return None
    folder = expanded(name)
    if not folder.is_dir():
        return {"id": name, "revision": None}
    place = cached_origin(folder.resolve())
    if place is None:
        return {"id": str(folder.resolve()), "revision": None}
    return {"id": place.name, "revision": place.revision}


def matrix_names(model: PreTrainedModel) -> tuple[str, str]:
    """The names of the word embedding's matrix and of the one that gives the logits."""
    names = {id(module): name for name, module in model.named_modules()}
    words, output = model.get_input_embeddings(), model.get_output_embeddings()
    return f"{names[id(words)]}.weight", f"{names[id(output)]}.weight"


def misfits(model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None) -> list[str]:
    """What a model holds that its class does not build, a sentence each: quantized weights, adapters, other layers.

    Such weights mean something else under the names that they have, or have no numbers that a file could hold.

    Args:
        weights: its state, where the model holds only a part of it, as under FSDP.
    """
    with building, torch.device("meta"), no_init_weights():
        built = type(model)(deepcopy(model.config))
    own = dict(model.named_modules())
    layers = {} if weights is not None else {name: part for name, part in built.named_modules() if any(_tensors(part))}
    found = [
        f"{name} is {_kind(own.get(name))}, where a {type(model).__name__} has {_kind(part)}"
        for name, part in layers.items()
        if not isinstance(own.get(name), type(part))
    ]
    found += [
        f"{name} is of the class {type(tensor).__name__}"
        for name, tensor in (_tensors(model, recurse=True) if weights is None else weights.items())
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer)
    ]
    places = built.state_dict().keys()
    found += [
        f"{name} has no place" for name in (model.state_dict() if weights is None else weights) if name not in places
    ]
    return [*found[:3], *([f"and {len(found) - 3} more"] if len(found) > 3 else [])]


def _tensors(module: nn.Module, recurse: bool = False) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)


def _kind(module: nn.Module | None) -> str:
    return "missing" if module is None else f"a {type(module).__name__}"


def without_copies(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model's state by name, without the output matrix where it is the word embedding."""
    copies = matrix_names(model)[1:] if is_tied(model) else ()
    return {name: tensor for name, tensor in weights.items() if name not in copies}


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output matrix is the word embedding in fact, whatever the config says."""
    words, output = model.get_input_embeddings(), model.get_output_embeddings()
    return output is not None and output.weight is words.weight
