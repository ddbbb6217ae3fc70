"""Where peft puts adapters by default: for a variant, where it would for the variant's base."""

from __future__ import annotations

from itertools import combinations
from types import ModuleType

from .families import TESTED
from .stored import VARIANT

try:
    from peft.utils import constants
except ImportError:  # peft is not installed, or does not fit
    constants = None


def register(tables: ModuleType) -> None:
    """Gives variants an entry in the tables of peft that name the layers to adapt by a model's `model_type`.

    All variants have one type, so the entry names the layers of all tested families; a model has those of its own
    alone. Tables in which two families share some names but not all, such as that of IA3, get none: there peft asks for
    `target_modules`. Entries that are there stay.

    Args:
        tables: `peft.utils.constants`.
    """
    for name, table in vars(tables).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
            choices = {frozenset(table[family]) for family in TESTED if family in table}
            if choices and not any(one & other for one, other in combinations(choices, 2)):
                table.setdefault(VARIANT, sorted(frozenset().union(*choices)))


if constants is not None:
    register(constants)
