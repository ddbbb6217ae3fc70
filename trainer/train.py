"""Trains: `accelerate launch trainer/train.py --config RECIPE.yaml [--any.option value ...]`.

Exit codes: 0 done; 2 a mistake in the config, the data or a path; 75 stopped by a signal after saving, `--resume` goes
on from there; 1 anything else. `accelerate launch` turns all but 0 into 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":  # run as a file from a clone that is not installed; `python -P` puts no folder in front
    sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[1])]

from filelock import FileLock, Timeout
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

import attention
from trainer import setup
from trainer.config import RunConfig, load_config
from trainer.data import DataError
from trainer.finish import finish
from trainer.loop import Loop, NonFiniteError, StoppedError
from trainer.signals import EXIT_STOPPED

logger = logging.getLogger("trainer")


class InUseError(Exception):
    """A folder belongs to another run."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a recipe; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="see trainer/recipes")
    options, overrides = parser.parse_known_args(arguments)
    try:
        config = load_config(options.config, overrides)
    except attention.ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if config.dry_run:
        config.output = str(Path(config.output) / "dry-run")
    with logging_redirect_tqdm(loggers=[logging.getLogger()]):
        return run(config)


def run(config: RunConfig) -> int:
    """Sets up, fits and saves; returns the exit code."""
    folder = Path(config.output)
    try:
        start_logging(folder)
    except OSError as error:
        sys.stderr.write(f"{folder} cannot be written: {error}\n")
        return 2
    try:
        with claimed(folder):
            return fit(config, folder)
    except InUseError as error:
        logger.error("%s", error)
        return 2


def fit(config: RunConfig, folder: Path) -> int:
    """What `run` does in the folder that is its own."""
    try:
        parts = setup.build(config)
        loop = Loop(parts)
        loop.restore()
        if parts.is_main:
            setup.write_record(config, folder)
        else:
            logging.getLogger().setLevel(logging.WARNING)
    except (DataError, OSError, ValueError) as error:
        logger.error("%s", error)
        return 2
    try:
        loop.fit()
        finish(loop)
    except StoppedError:
        logger.info("stopped after step %d; --resume goes on from there", loop.step)
        return EXIT_STOPPED
    except (DataError, NonFiniteError, OSError) as error:
        logger.error("%s", error)
        return 1
    finally:
        parts.accelerator.end_training()
    return 0


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the first process of a run does that for all of its processes.

    Raises:
        InUseError: if another run has it.
    """
    lock = FileLock(folder / ".lock")
    if os.environ.get("RANK", "0") == "0":
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InUseError(
                f"{folder} belongs to a run that still goes on: wait for its end, or choose another --output"
            ) from None
        except (NotImplementedError, OSError) as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked against other runs: %s", folder, error)
    try:
        yield
    finally:
        lock.release()


def start_logging(folder: Path) -> None:
    """Logs to stderr and to train.log in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(), logging.FileHandler(folder / "train.log", encoding="utf-8")],
        force=True,
    )
    logging.raiseExceptions = False  # a full disk must not bury its own message
    for name in ("httpx", "httpx2", "filelock", "matplotlib", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
