"""Attention maps in a notebook: one call, nothing to serve, nothing to fetch."""

from __future__ import annotations

import html
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import attention

from .attention import AttentionViews, Subject, encode_text, passage
from .components.maps import standalone
from .limits import Limits
from .models import Entry, LoadedModel

LONGEST_TEXT = 1_000_000  # characters


class AttentionPage:
    """A page of attention maps; a notebook shows it in a frame, and `save` writes it as a file of its own.

    Attributes:
        page: the HTML.
        height: of the frame, in pixels.
    """

    def __init__(self, page: str, height: int):
        self.page, self.height = page, height

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.page, quote=True)}" title="Attention" '
            f'style="border: 0; height: {self.height}px; width: 100%"></iframe>'
        )

    def save(self, path: str | Path) -> Path:
        """Writes the page; returns where."""
        path = Path(path)
        path.write_text(self.page, encoding="utf-8")
        return path


def attention_view(
    model: PreTrainedModel | str | Path,
    text: str,
    *,
    layer: int = 0,
    head: int = 0,
    start: int = 0,
    count: int = 128,
    base: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dark: bool = False,
    height: int = 1100,
) -> AttentionPage:
    """What one head attends to in a text, as the app shows it: for Jupyter and Colab, offline.

        attention_view("checkpoints/nsa", "The old house stood at the end of the lane.", layer=4, head=1)

    Args:
        model: a base or a variant, or the folder or Hub name of one, which is then loaded with its base.
        text: any text; the model reads as much of it, up to the last token shown, as it holds.
        start, count: the part of the text that is shown, in tokens.
        base: what a variant is compared with, where it was not loaded by name.
        tokenizer: default the one beside the model's files.
        dark: colours for a dark notebook.
        height: of the frame, in pixels.

    Raises:
        ViewError: if there is no such layer or head, or the text is empty.
        OSError: if a folder or name does not lead to a model, or there is no tokenizer.
    """
    loaded = _loaded(model, base, tokenizer)
    part = passage(loaded, encode_text(loaded, text, LONGEST_TEXT), start, min(count, Limits().view_tokens))
    view = AttentionViews().maps(Subject(loaded, part), layer, head)
    return AttentionPage(standalone(view, dark), height)


def _loaded(
    model: PreTrainedModel | str | Path, base: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> LoadedModel:
    """A model as the views take it."""
    name = Path(model.name_or_path if isinstance(model, PreTrainedModel) else model).name
    if not isinstance(model, PreTrainedModel):
        found = attention.describe(str(model))
        if base is None and found.base is not None:
            base, _ = attention.load(found.base)
        model, own = attention.load(str(model), base=base) if found.base is not None else attention.load(str(model))
        tokenizer = tokenizer or own
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model.name_or_path)
    mechanisms = getattr(model, "mechanisms", [])
    methods = {mechanism.config.method for mechanism in mechanisms} or {"softmax"}
    method = methods.pop() if len(methods) == 1 else attention.LayersConfig.method
    entry = Entry(
        name=name or method,
        source=name,
        folder=Path(name),
        method=method,
        description=attention.CONFIGS[method].description,
        size=0,
        is_base=not len(mechanisms),
        base="base" if base is not None else None,
    )
    made_from = None
    if base is not None and not entry.is_base:
        plain = Entry("base", "base", Path("base"), "softmax", attention.SoftmaxConfig.description, 0, True)
        made_from = LoadedModel(plain, base.eval(), tokenizer)
    return LoadedModel(entry, model.eval(), tokenizer, made_from)
