"""Serves the demo: `python app.py`, then open http://127.0.0.1:7860."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if __name__ == "__main__" and sys.flags.safe_path:  # `python -P`
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo.context import App
from demo.example import CHECKPOINTS
from demo.models import ModelStore, bundled, words
from demo.page import serve


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="Efficient attention, side by side: the demo.", allow_abbrev=False)
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        action="extend",
        metavar="SPEC",
        help="further models: folders, or user/repo[/subfolder][@revision] on the Hub (default: $CHECKPOINTS)",
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--mcp", action="store_true", help="serve the endpoints as MCP tools too")
    options = parser.parse_args(arguments)
    options.checkpoints = words("CHECKPOINTS") if options.checkpoints is None else options.checkpoints
    return options


def main(arguments: list[str] | None = None) -> int:
    """Builds the app from the options and serves it until interrupted; 2 for a mistake in them."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        options = parse(arguments)
        app = App(ModelStore([*bundled(CHECKPOINTS), *options.checkpoints]))
        serve(app, options.host, options.port, mcp_server=options.mcp or None)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
