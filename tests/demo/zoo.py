"""One tiny model of every method, as the views see them."""

from pathlib import Path

import attention
from demo.models import Entry, LoadedModel

SMALL = {
    "softmax": {},
    "masks": {
        "first_layers": [["last(0)", "last(2)", "window(6)", "first(2)"]],
        "candidates": ["window(6)", "top(4)", "induction(2)"],
    },
    "performer": {"num_features": 8, "window": 4},
    "nsa": {
        "compress_block": 8,
        "compress_stride": 4,
        "select_block": 8,
        "num_selected": 3,
        "window": 8,
        "select_every": 4,
    },
}
SMALL["layers"] = {
    "layers": [
        {"layers": [0], "method": "performer", **SMALL["performer"]},
        {"layers": [1], "method": "nsa", **SMALL["nsa"]},
    ]
}


def load_zoo(folder: Path) -> dict[str, LoadedModel]:
    """The base in `folder` as "base", and a variant of it by each method's name."""
    model, tokenizer = attention.load(folder)
    base = LoadedModel(_entry("base", "softmax", folder, None), model, tokenizer)
    zoo = {"base": base}
    for method, options in SMALL.items():
        variant = attention.convert(model, attention.config_from_dict({"method": method, **options})).eval()
        zoo[method] = LoadedModel(_entry(method, method, folder, "base"), variant, tokenizer, base)
    return zoo


def _entry(name: str, method: str, folder: Path, base: str | None) -> Entry:
    return Entry(name, str(folder), folder, method, f"What {method} does.", 1000, base is None, base)
