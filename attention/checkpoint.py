"""Looks at variants, pulls them from the Hub and pushes them to it."""

from __future__ import annotations

import argparse
import json
import sys

from .errors import CheckpointError
from .hub import HubOptions
from .loading import describe, hub_size
from .pushing import push


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status, 1 for a checkpoint that could not be read or moved."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attention.checkpoint", description="Look at, pull and push variants."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="check a variant's files and say what it is, as JSON")
    info.set_defaults(run=_info)
    pull = commands.add_parser("pull", help="download a variant and its base; print the folder")
    pull.set_defaults(run=_pull)
    for command in (info, pull):
        command.add_argument("spec", help="a folder, or user/repo[/subfolder][@revision]")
        command.add_argument("--offline", action="store_true", help="use the cache alone")

    command = commands.add_parser("push", help="upload a variant in one commit")
    command.set_defaults(run=_push)
    command.add_argument("folder", help="what attention.save wrote")
    command.add_argument("to", help="user/repo[/subfolder]; the repository is made if there is none")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--revision", help="a branch; made if there is none")
    command.add_argument(
        "--include_base",
        action=argparse.BooleanOptionalAction,
        help="upload all weights, not only those that differ from the base; by default if the base is a local folder",
    )
    command.add_argument("--dry_run", action="store_true", help="list the files and do nothing")
    return parser


def _info(options: argparse.Namespace) -> None:
    found = describe(options.spec, HubOptions(local_files_only=options.offline))
    description = {
        "folder": str(found.folder),
        "method": found.method,
        "options": found.options,
        "base": found.base,
        "bytes": sum(path.stat().st_size for path in found.folder.iterdir() if path.is_file()),
    }
    print(json.dumps(description, indent=2))


def _pull(options: argparse.Namespace) -> None:
    hub = HubOptions(local_files_only=options.offline)
    print(f"{hub_size(options.spec, hub) / 1e6:.1f} MB to download", file=sys.stderr)
    found = describe(options.spec, hub)
    if found.base is not None:
        describe(found.base, hub)
    print(found.folder)


def _push(options: argparse.Namespace) -> None:
    done = push(
        options.folder,
        options.to,
        private=options.private,
        revision=options.revision,
        include_base=options.include_base,
        dry_run=options.dry_run,
    )
    for path, size in done.files.items():
        print(f"{size:>12,}  {path}")
    total = sum(done.files.values()) / 1e6
    print(f"{len(done.files)} files, {total:.1f} MB" + (f": {done.url}" if done.url else " would go to " + done.spec))


if __name__ == "__main__":
    sys.exit(main())
