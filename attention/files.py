"""Checkpoint folders: weights in shards, a manifest that detects damage, and replacement in one step."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from .errors import BrokenCheckpointError, CheckpointError, NotAModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
CARD = "README.md"
HISTORY = "training.jsonl"
PAIRS = "pairs.safetensors"  # of a base: which pairs of tokens are frequent
SHARD_SIZE = "8MB"  # a Space refuses plain files of more than 10 MB

LARGEST_JSON = 64 * 2**20  # bytes of a config, an index or a manifest
LONGEST_HEADER = 8 * 2**20  # bytes of a safetensors file's header; some 70,000 tensors
MOST_TENSORS = 50_000

# The files of tokenizers, whatever their class calls them.
VOCABULARIES = ("*.txt", "*.model", "*.spm", "*.bpe", "*.codes", "*.tiktoken", "*.tokenizer")
SENTENCEPIECE = ("*.model", "*.spm")
# What is read of a checkpoint: neither code nor pickles, so nothing of it can run.
PATTERNS = ("*.json", "*.jsonl", "model*.safetensors", PAIRS, *VOCABULARIES, "*.jinja", "README.md")
OWN_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds files of a tokenizer; some have settings alone."""
    names = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "added_tokens.json", *VOCABULARIES)
    return any(fnmatch(path.name, name) for path in folder.iterdir() for name in names)


def needs_sentencepiece(folder: Path) -> bool:
    """Whether the only tokenizer in a folder is one of SentencePiece, which is not installed."""
    models = [path for name in SENTENCEPIECE for path in folder.glob(name)]
    return bool(models) and not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights.

    Raises:
        NotAModelError: if there are none.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise NotAModelError(f"{folder} has no {WEIGHTS}; weights in other formats, such as pickles, are not read")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise BrokenCheckpointError(folder, [f"{INDEX} has no weight_map that names a file for each tensor"])
    names = sorted(set(places.values()))
    if any(Path(name).name != name for name in names):
        raise NotAModelError(f"{folder / INDEX} points outside its folder")
    if strange := [name for name in names if not name.endswith(".safetensors") or "\0" in name]:
        raise NotAModelError(f"{folder / INDEX} names {strange[:3]}, which are no safetensors files")
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, on the CPU, as stored; pages are read when they are used.

    Raises:
        BrokenCheckpointError: if a file is not a safetensors file, or is missing.
        NotAModelError: if there are no weights.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            if path.stat().st_size > LONGEST_HEADER:
                with path.open("rb") as file:
                    _check_header(path, file.read(8))
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                _check_count(path, len(tensors) + len(names))
                tensors.update({name: file.get_tensor(name) for name in names})
        except CheckpointError:
            raise
        except Exception as error:  # SafetensorError, OSError, and what an unknown dtype leads to
            raise BrokenCheckpointError(folder, [f"{path.name} cannot be read: {error}"]) from error
    return tensors


def _check_header(path: Path, start: bytes) -> None:
    """Refuses a safetensors file, by its first 8 bytes, whose header alone would take seconds to read."""
    if (length := int.from_bytes(start, "little")) > LONGEST_HEADER:
        raise BrokenCheckpointError(
            path.parent, [f"{path.name} has a header of {length:,} bytes; the most is {LONGEST_HEADER:,}"]
        )


def _check_count(path: Path, count: int) -> None:
    if count > MOST_TENSORS:
        raise BrokenCheckpointError(
            path.parent, [f"{path.name} brings {count:,} tensors; the most is {MOST_TENSORS:,}"]
        )


def parse_weights(path: Path, content: bytes) -> dict[str, Tensor]:
    """The tensors in the content of a safetensors file.

    Raises:
        BrokenCheckpointError: if it is not one.
    """
    _check_header(path, content[:8])
    try:
        tensors = load(content)
    except Exception as error:  # SafetensorError, KeyError, ValueError, and what an unknown dtype leads to
        raise BrokenCheckpointError(path.parent, [f"{path.name} cannot be read: {error}"]) from error
    _check_count(path, len(tensors))
    return tensors


def write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_size: int | str = SHARD_SIZE) -> None:
    """Writes tensors as transformers would: one file, or shards with an index.

    A tensor larger than `max_shard_size` (bytes, or a string such as "8MB") gets a file of its own.
    """
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for filename, names in (split.filename_to_tensors or {WEIGHTS: []}).items():
        shard = {name: tensors[name].contiguous() for name in names}
        (folder / filename).write_bytes(save(shard, metadata={"format": "pt"}))
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes; the same however the tensors are spread over files."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_manifest(folder: Path, files: Mapping[str, Path] | None = None) -> None:
    """Records which files make up a variant, and size and SHA-256 of those that are read when it is loaded.

    Args:
        files: where each file is now, by name; by default all files in `folder`.
    """
    if files is None:
        files = {path.name: path for path in folder.iterdir() if path.is_file()}
    entries = {
        name: _measure(files[name].read_bytes()) if _is_checked(name) else None
        for name in sorted(files)
        if name != MANIFEST
    }
    (folder / MANIFEST).write_bytes(_dump_manifest(entries))


def read_manifest(folder: Path) -> dict[str, dict[str, Any] | None]:
    """What `write_manifest` recorded, by file name.

    Raises:
        BrokenCheckpointError: if it is missing, or is not what `write_manifest` writes.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError:
        raise BrokenCheckpointError(folder, [f"{MANIFEST} is missing"]) from None
    try:
        files = json.loads(content)["files"]
        intact = content == _dump_manifest(files)  # so that no single bit of it can change unnoticed
        intact = intact and all(Path(name).name == name and _is_entry(entry) for name, entry in files.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise BrokenCheckpointError(folder, [f"{MANIFEST} was changed or cut short"])
    return files


def check(folder: Path, take: Callable[[str, bytes], None] | None = None) -> None:
    """Compares every file of a variant with its manifest.

    Args:
        take: called with the name and the content of every file that is right.

    Raises:
        BrokenCheckpointError: naming all files that are missing, cut short or changed.
    """
    problems = []
    for name, expected in read_manifest(folder).items():
        if expected is None:
            continue
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected["size"]:
            problems.append(f"{name} has {size} bytes instead of {expected['size']}")
        elif _measure(content := path.read_bytes()) != expected:
            problems.append(f"{name} has other content than when it was written (SHA-256 differs)")
        elif take is not None:
            take(name, content)
    if problems:
        raise BrokenCheckpointError(folder, problems)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BrokenCheckpointError: if it is not one.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise BrokenCheckpointError(path.parent, [f"{path.name} has {size:,} bytes; the most is {LARGEST_JSON:,}"])
        content = path.read_bytes()
    except CheckpointError:
        raise
    except OSError as error:
        raise BrokenCheckpointError(path.parent, [f"{path.name} cannot be read: {error}"]) from error
    return parse_json(path, content)


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object in the content of a file.

    Raises:
        BrokenCheckpointError: if it is not one.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpointError(path.parent, [f"{path.name} cannot be read: {error}"]) from error
    if not isinstance(data, dict):
        raise BrokenCheckpointError(path.parent, [f"{path.name} holds no JSON object"])
    return data


def expanded(path: str | Path) -> Path:
    """A path with `~` as the home folder that it stands for; that of a user whom there is not stays as it is."""
    return Path(os.path.expanduser(path))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes a JSON object, readable, with a newline at the end."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_file(path: Path, content: bytes) -> Path:
    """Writes a file, complete or not at all; what was there before is lost only after that. A link stays a link.

    Raises:
        OSError: if the disk refuses.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.write_bytes(content)
        _flush(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place when the block ends well, and vanishes otherwise.

    Where `folder` is a link, its target is replaced. Files of `folder` that are not written anew are copied over,
    unless they are read when the old variant is loaded. A crash between the two renames leaves the old folder beside,
    where `existing` and the next call find it. One process at a time may replace a folder.

    Raises:
        CheckpointError: if `folder` holds something else than a variant, or the disk refuses.
    """
    folder = _followed(folder)
    _restore(folder)
    if _exists(folder) and not _may_replace(folder):
        raise CheckpointError(f"{folder} exists and is not a variant; choose a new folder, or delete it first")
    for stale in folder.parent.glob(f".{glob.escape(folder.name)}.new-*"):
        shutil.rmtree(stale, ignore_errors=True)
    new = folder.with_name(f".{folder.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        new.mkdir(parents=True)
        yield new
        _keep_foreign_files(folder, new)
        for path in [*new.iterdir(), new]:
            _flush(path)
        if folder.exists():
            folder.rename(_backup(folder))
        new.rename(folder)
        _flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        _restore(folder)
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            kept = " What was there before is untouched." if folder.exists() else ""
            raise CheckpointError(f"{folder} could not be written: {error}.{kept}") from error
        raise
    shutil.rmtree(_backup(folder), ignore_errors=True)


def existing(folder: Path) -> Path:
    """`folder`, or where its content lies if its replacement was interrupted."""
    backup = _backup(_followed(folder))
    return backup if _exists(backup) and not _exists(folder) else folder


def _followed(folder: Path) -> Path:
    """Where a link leads, also one whose target is missing; other paths as they are."""
    return Path(os.path.realpath(folder)) if os.path.islink(folder) else folder


def _exists(path: Path) -> bool:
    """Whether there is something; not, for a name that is too long for the disk."""
    return os.path.exists(path)


def _restore(folder: Path) -> None:
    backup = _backup(folder)
    if not os.path.isdir(backup):
        return
    if folder.exists():
        shutil.rmtree(backup, ignore_errors=True)
    else:
        backup.rename(folder)


def _may_replace(folder: Path) -> bool:
    """True for a variant, and for a folder of loose files, such as a tokenizer saved before its model."""
    if not folder.is_dir():
        return False
    other_model = (folder / "config.json").exists() or any(path.is_dir() for path in folder.iterdir())
    return (folder / MANIFEST).is_file() or not other_model


def _backup(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _keep_foreign_files(old: Path, new: Path) -> None:
    if not old.exists():
        return
    own = {MANIFEST}
    if (old / MANIFEST).is_file():
        try:
            own |= {name for name, entry in read_manifest(old).items() if entry is not None}
        except BrokenCheckpointError:  # then go by what such files look like
            own |= {path.name for path in old.iterdir() if path.suffix in (".json", ".safetensors")}
    for path in old.iterdir():
        if path.name in own or (new / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _flush(path: Path) -> None:
    """Has the disk hold what was written, before a rename makes it count."""
    if path.is_symlink() or (os.name == "nt" and path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_checked(name: str) -> bool:
    return name != CARD and any(fnmatch(name, pattern) for pattern in PATTERNS)  # people may edit the card


def _measure(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _is_entry(entry: object) -> bool:
    return entry is None or (isinstance(entry, dict) and entry.keys() == {"size", "sha256"})


def _dump_manifest(files: dict[str, dict[str, Any] | None]) -> bytes:
    return (json.dumps({"files": files}, indent=2) + "\n").encode()
