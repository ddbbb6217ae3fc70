"""Which tokens of a text have to be looked up in it; what a hit is stands in `trainer.hits`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from attention import CheckpointError
from trainer.hits import PairTable, find_pairs, hit_distances

from .models import LoadedModel

logger = logging.getLogger(__name__)

_TABLES: WeakKeyDictionary[PreTrainedModel, PairTable | None] = WeakKeyDictionary()


def distances(base: LoadedModel, token_ids: Sequence[int]) -> list[int]:
    """How many tokens back each token can be looked up, 0 for one that is no hit.

    Empty where no table of pairs lies with the base, which would say what is rare.
    """
    table = _table(base)
    return [] if table is None else hit_distances(token_ids, table).tolist()


def _table(base: LoadedModel) -> PairTable | None:
    """The base's table, read once for a model in memory."""
    if base.model not in _TABLES:
        try:
            _TABLES[base.model] = find_pairs(base.entry.folder, base.tokenizer)
        except (CheckpointError, ValueError, OSError) as error:
            logger.warning("hits are not marked: %s", error)
            _TABLES[base.model] = None
    return _TABLES[base.model]
