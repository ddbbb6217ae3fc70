"""Checkpoints as a stranger might make them: right manifests, wrong content; each from its number alone."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from attention import files

WRONG_VALUES: tuple[Any, ...] = (
    *(-1, 0, 10**6, 10**9, 10**30, 2.5, float("nan"), 1e999, True, "twelve", "", "\0", [], [1], {}, {"a": 1}),
    [[[[]]]],
)
SIZES = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions", "n_inner", "num_hidden_layers", "hidden_size")
OPTIONS: dict[str, dict[str, Any]] = {
    "nsa": dict.fromkeys(("num_selected", "window", "select_block", "mlp_width", "seed"), 10**9)
    | {"compress_block": 2**20, "separate_kv": "yes", "window_gate": float("nan")},
    "performer": {"num_features": 10**7, "window": 10**9, "hidden": 10**7, "seed": -1, "chunk_size": 10**9}
    | {"feature_map": ["learned"], "redraw_every": -3},
    "masks": {
        "candidates": [f"window({n})" for n in range(1, 10_001)],
        "first_layers": [["window(3)"]] * 10_000,
        "scale": 1e308,
        "seed": 10**30,
        "init": {},
        "per_head": None,
    },
    "layers": {"layers": [{"layers": [10**9], "method": "softmax"}], "method": []},
}


def make_hostile(source: Path, folder: Path, number: int) -> str:
    """Copies a variant or a base and makes it hostile; returns in what way."""
    rng = random.Random(number)
    shutil.copytree(source, folder)
    kinds = [_sizes, _types, _options, _bases, _headers, _deep, _shapes, _indices]
    kind = kinds[number % len(kinds)]
    said = kind(folder, rng)
    if (folder / files.MANIFEST).is_file():
        files.write_manifest(folder)
    return f"{kind.__name__}: {said}"


def _change(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def _sizes(folder: Path, rng: random.Random) -> str:
    name, value = rng.choice(SIZES), rng.choice([10**3, 10**6, 10**9, 10**12, 10**30, 0, -5, 17])
    _change(folder, lambda config: config.update({name: value}))
    return f"{name}={value}"


def _types(folder: Path, rng: random.Random) -> str:
    name = rng.choice([*SIZES, "model_type", "layer_norm_epsilon", "activation_function", "attention"])
    if name == "attention" and not (folder / files.MANIFEST).is_file():  # which a plain model has no use for
        name = "n_layer"
    value = rng.choice([value for value in WRONG_VALUES if value is not True and value not in (2.5, {}, [])])
    _change(folder, lambda config: config.update({name: value}))
    return f"{name}={value!r}"


def _options(folder: Path, rng: random.Random) -> str:
    method = rng.choice(list(OPTIONS))
    name = rng.choice(list(OPTIONS[method]))
    value = OPTIONS[method][name]
    attention = {"method": method} | {name: value}
    _change(folder, lambda config: config.update({"model_type": "attention-variant", "family": "gpt2"}))
    _change(folder, lambda config: config.update({"attention": attention}))
    return f"{method}.{name}"


def _bases(folder: Path, rng: random.Random) -> str:
    good = {"id": "../base", "revision": None, "sha256": 64 * "0"}
    name = rng.choice(["id", "revision", "sha256", "all"])
    value = rng.choice([5, [], ["a"], {"a": 1}, True, "\0", "../" * 40, 4000 * "x", "./" + 300 * "y"])
    base = value if name == "all" else good | {name: value}
    _change(folder, lambda config: config.update({"model_type": "attention-variant", "family": "gpt2", "base": base}))
    return f"base {name}={value!r:.30}"


def _headers(folder: Path, rng: random.Random) -> str:
    path = folder / "model.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    name, header = rng.choice(
        [
            ("huge shape", {"a": entry | {"shape": [2**40]}}),
            ("overflow", {"a": entry | {"shape": [2**33, 2**33, 2**33]}}),
            ("offsets", {"a": entry | {"data_offsets": [4, 0]}}),
            ("overlap", {"a": entry, "b": entry}),
            ("past the end", {"a": entry | {"data_offsets": [0, 2**62], "shape": [2**60]}}),
            ("dtype", {"a": entry | {"dtype": rng.choice(["F3", "", 5, None, "F8_E8M0", "F4"])}}),
            ("no entries", {"a": {}}),
            ("a list", [entry]),
            ("200,000 empty", {f"t{n}": entry | {"shape": [0], "data_offsets": [0, 0]} for n in range(200_000)}),
            ("negative", {"a": entry | {"shape": [-1]}}),
            ("metadata", {"__metadata__": {"format": 5}, "a": entry}),
        ]
    )
    written = json.dumps(header).encode()
    length = rng.choice([len(written), len(written), 2**63 - 1, 2**40, 0])
    path.write_bytes(struct.pack("<Q", length) + written + b"\0\0\0\0")
    return f"{name}, length {length}"


def _deep(folder: Path, rng: random.Random) -> str:
    depth, name = rng.choice([500, 900, 5000, 100_000]), rng.choice(["config.json", "attention", "n_layer"])
    deep = depth * rng.choice(["[", '{"a":'])
    closed = deep + ("1" if "{" in deep else "") + depth * ("]" if "[" in deep else "}")
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    whole = closed if name == "config.json" else f'{text}, "{name}": {closed}, "model_type": "attention-variant"}}'
    (folder / "config.json").write_text(whole)
    return f"{depth} levels in {name}"


def _shapes(folder: Path, rng: random.Random) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = rng.choice(sorted(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()))
    tensor = tensors[name]
    what, wrong = rng.choice(
        [
            ("longer", torch.zeros(2 * tensor.shape[0], *tensor.shape[1:])),
            ("flat", tensor.flatten()[:-1].clone()),
            ("of another rank", tensor[None].repeat(2, *(1,) * tensor.ndim)),
            ("of integers", torch.ones(tensor.shape, dtype=torch.int64)),
            ("NaN", torch.full_like(tensor, float("nan"))),
            ("infinite in one place", tensor.index_fill(0, torch.tensor([0]), float("-inf"))),
            ("empty", torch.zeros(0)),
        ]
    )
    save_file(tensors | {name: wrong}, folder / "model.safetensors", metadata={"format": "pt"})
    return f"{name} is {what}"


def _indices(folder: Path, rng: random.Random) -> str:
    (folder / "model.safetensors").unlink()
    places = rng.choice(
        [
            *(
                None,
                5,
                [],
                ["a"],
                {"a": None},
                {"a": ["b"]},
                {"a": "\0"},
                {"a": ""},
                {"a": "../base/model.safetensors"},
            ),
            *({"a": "config.json"}, {"a": "."}, {"a": 5000 * "x" + ".safetensors"}, {"a": "missing.safetensors"}),
        ]
    )
    (folder / files.INDEX).write_text(json.dumps({"weight_map": places}))
    return f"weight_map {places!r:.40}"
