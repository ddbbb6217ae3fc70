"""Visual components: `gr.HTML` subclasses, each with its own script and style; usable in any Gradio app."""

from .tokens import TokenColumns

__all__ = ["TokenColumns"]
