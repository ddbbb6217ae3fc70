"""The Gradio app: what it computes (engine, models) and what it shows (one builder per tab)."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
