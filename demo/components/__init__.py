"""Visual components: `gr.HTML` subclasses, each with its own script and style; usable in any Gradio app."""

from .curves import Curves
from .facts import Facts
from .heads import HeadGrid
from .maps import AttentionMaps
from .meter import Meter
from .samples import Samples
from .tokens import TokenColumns

__all__ = ["AttentionMaps", "Curves", "Facts", "HeadGrid", "Meter", "Samples", "TokenColumns"]
