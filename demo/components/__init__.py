"""Visual components: `gr.HTML` subclasses, each with its own script and style; usable in any Gradio app."""

from .curves import Curves
from .heads import HeadGrid
from .maps import AttentionMaps
from .meter import Meter
from .tokens import TokenColumns

__all__ = ["AttentionMaps", "Curves", "HeadGrid", "Meter", "TokenColumns"]
