"""The tabs of the app, one builder each."""

from .attention import build_attention_tab
from .generate import build_generate_tab
from .models import build_models_tab
from .score import build_score_tab
from .speed import build_speed_tab
from .training import build_training_tab

__all__ = [
    "build_attention_tab",
    "build_generate_tab",
    "build_models_tab",
    "build_score_tab",
    "build_speed_tab",
    "build_training_tab",
]
