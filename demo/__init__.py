"""The Gradio app: what it computes (engine, models) and what it shows (one builder per tab)."""
