"""Serves the demo: `python app.py`, then open http://127.0.0.1:7860."""

from __future__ import annotations

import argparse
import logging
import os

from demo.context import App
from demo.example import CHECKPOINTS
from demo.models import ModelStore, bundled
from demo.page import serve


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="Efficient attention, side by side: the demo.")
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        metavar="SPEC",
        default=os.environ.get("CHECKPOINTS", "").split(),
        help="further models: folders, or user/repo[/subfolder][@revision] on the Hub (default: $CHECKPOINTS)",
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--mcp", action="store_true", help="serve the endpoints as MCP tools too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Builds the app from the options and serves it until interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    options = parse(arguments)
    app = App(ModelStore([*bundled(CHECKPOINTS), *options.checkpoints]))
    serve(app, options.host, options.port, mcp_server=options.mcp or None)


if __name__ == "__main__":
    main()
