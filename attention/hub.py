"""Checkpoints on the Hub: naming, measuring and pulling them."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, __version__, constants
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, tqdm

from .errors import CheckpointError, MissingCheckpointError, MissingRevisionError, NetworkError
from .files import PATTERNS

LONGEST_NAME = 200  # bytes of each part; the disk takes 255, some of which the cache needs
PASSING = (408, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
LONGEST_WAIT = 60.0  # seconds
CLIENT_LISTS = tuple(map(int, __version__.split(".")[:2])) >= (1, 22)  # the client lists files in its cache itself

Progress = Callable[[int, int], None]
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
logger = logging.getLogger(__name__)
# What was not answered at all, as the client's own client says it: httpx, or httpx2 from huggingface_hub 2 on.
TransportError: type[Exception] = import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0]).TransportError


@dataclass(frozen=True)
class HubSpec:
    """Where a checkpoint lies on the Hub: "repo", "user/repo", "user/repo/sub/folder", each with "@revision" or not."""

    repo_id: str
    subfolder: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSpec:
        """Reads a spec.

        Raises:
            MissingCheckpointError: if it cannot be the name of a repository.
        """
        name, _, revision = text.partition("@")
        parts = name.split("/")
        if not all(re.fullmatch(r"[\w][\w.\-]*", part) for part in parts) or not _is_short(parts, revision):
            raise MissingCheckpointError(
                f"{text!r} is neither a folder nor a name on the Hub (user/repo[/subfolder][@revision])"
            )
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision or None)

    @property
    def name(self) -> str:
        """The spec without its revision."""
        return f"{self.repo_id}/{self.subfolder}" if self.subfolder else self.repo_id

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def arguments(self) -> str:
        """The spec as arguments of transformers' `from_pretrained`, in Python."""
        options = {"subfolder": self.subfolder, "revision": self.revision}
        return ", ".join([f'"{self.repo_id}"', *(f'{name}="{value}"' for name, value in options.items() if value)])

    def path(self, name: str) -> str:
        """A file's path in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def _is_short(parts: list[str], revision: str) -> bool:
    """Whether the cache can have files of these names."""
    return all(len(part.encode()) <= LONGEST_NAME for part in [*parts, *revision.split("/")]) and len(parts) <= 20


@dataclass(frozen=True)
class HubOptions:
    """How to reach the Hub.

    Attributes:
        api: endpoint and token; by default those of the environment.
        cache_dir: where pulled files are kept; by default the Hub's cache.
        local_files_only: use the cache alone.
        force_download: pull files again that the cache holds.
        tries: how often to ask where it may help, after as long as the Hub asks to wait.
        sleep: waits some seconds.
    """

    api: HfApi | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    tries: int = 3
    sleep: Callable[[float], object] = time.sleep

    @property
    def client(self) -> HfApi:
        return self.api or HfApi()


HUB = HubOptions()


def pull(spec: HubSpec, hub: HubOptions = HUB, progress: Progress | None = None) -> Path:
    """Downloads a checkpoint unless the cache has it; by commit, the cache is enough.

    Args:
        progress: called with the bytes that have arrived and the bytes expected, instead of a progress bar.

    Returns:
        Its folder in the cache.

    Raises:
        MissingCheckpointError, MissingRevisionError, NetworkError: each saying what to do.
    """
    arguments = {**_selection(spec), "cache_dir": hub.cache_dir}

    def fetched(local_files_only: bool) -> Path:
        bar = _reporting(progress) if progress else _Limited
        options = {} if local_files_only else {"force_download": hub.force_download, "tqdm_class": bar}
        return Path(hub.client.snapshot_download(**arguments, local_files_only=local_files_only, **options))

    def download() -> Path:
        if not hub.force_download and _is_listed(_commit_folder(spec, hub), spec.subfolder):
            return fetched(local_files_only=True)
        try:
            return fetched(hub.local_files_only)
        except TransportError as error:  # of the kinds that the client does not fall back from by itself
            try:
                root = fetched(local_files_only=True)
            except LocalEntryNotFoundError:
                raise error from None
        if not is_complete(root / spec.subfolder):
            with suppress(TransportError):
                return fetched(local_files_only=False)  # goes on where it broke off
        return root

    root = _asked(spec, hub, download)
    folder = root / spec.subfolder
    if not (folder / "config.json").is_file():
        where = f"no folder {spec.subfolder!r} with a config.json" if spec.subfolder else "no config.json"
        raise MissingCheckpointError(f"{spec.repo_id} on the Hub has {where} at revision {spec.revision or 'main'}")
    if not (CLIENT_LISTS or hub.local_files_only or is_complete(folder)):
        _list_files(spec, root, hub)
    return folder


def pull_file(spec: HubSpec, name: str, hub: HubOptions = HUB) -> Path:
    """Downloads one file of a checkpoint's folder unless the cache has it; raises what `pull` raises."""

    def download() -> str:
        return hub.client.hf_hub_download(
            spec.repo_id,
            spec.path(name),
            revision=spec.revision,
            cache_dir=hub.cache_dir,
            local_files_only=hub.local_files_only,
            force_download=hub.force_download,
            tqdm_class=_Limited,
        )

    return Path(_asked(spec, hub, download))


def download_size(spec: HubSpec, hub: HubOptions = HUB) -> int:
    """Bytes that `pull` would download now; 0 where the cache has everything.

    Raises:
        MissingCheckpointError, MissingRevisionError, NetworkError.
    """
    if hub.local_files_only:
        return 0

    def measure() -> list[Any]:
        try:
            return hub.client.snapshot_download(
                **_selection(spec),
                cache_dir=hub.cache_dir,
                force_download=hub.force_download,
                dry_run=True,
                tqdm_class=_Silent,
            )
        except DryRunError as error:
            raise error.__cause__ or error from None

    files = _asked(spec, hub, measure)
    return sum(file.file_size for file in files if file.will_download)


def cached_origin(folder: Path) -> HubSpec | None:
    """The spec that a folder in the Hub's cache was pulled from, by commit; None for other folders."""
    parts = folder.parts
    for at in range(len(parts) - 2, 0, -1):
        if parts[at] == "snapshots" and parts[at - 1].startswith("models--"):
            repo_id = "/".join(parts[at - 1].split("--")[1:])
            return HubSpec(repo_id, "/".join(parts[at + 2 :]), parts[at + 1])
    return None


def is_complete(folder: Path) -> bool:
    """Whether nothing that belongs to a folder can be missing: it is no part of the Hub's cache, or was pulled whole.

    The cache lists a commit's files when `pull` was there; whoever fetched single files left no list.
    """
    place = cached_origin(folder)
    if place is None:
        return True
    root = folder.parents[len(Path(place.subfolder).parts) - 1] if place.subfolder else folder
    if any((root.parents[1] / "trees").glob(f"{place.revision}*")):
        return True
    return _is_listed(root, place.subfolder)


def _commit_folder(spec: HubSpec, hub: HubOptions) -> Path:
    """Where the cache has a spec's commit, if it is one by commit."""
    cache = Path(hub.cache_dir or constants.HF_HUB_CACHE)
    return cache / f"models--{spec.repo_id.replace('/', '--')}" / "snapshots" / (spec.revision or "main")


def _is_listed(root: Path, subfolder: str) -> bool:
    """Whether a commit's folder has a list and all that is on it."""
    path = _list_of(root, subfolder)
    return path.is_file() and all((root / name).is_file() for name in path.read_text("utf-8").splitlines())


def _list_of(root: Path, subfolder: str) -> Path:
    """The list of a folder's files that `pull` keeps beside a commit where the client keeps none."""
    return root.parents[1] / "pulled" / root.name / subfolder / "files.txt"


def _list_files(spec: HubSpec, root: Path, hub: HubOptions) -> None:
    """Keeps such a list, unless the Hub does not say now what it has.

    Raises:
        NetworkError: naming files that did not arrive, or if what answers is not the Hub.
    """
    with _translated(spec):
        try:
            files = hub.client.list_repo_files(spec.repo_id, revision=root.name)
        except (HfHubHTTPError, TransportError, OfflineModeIsEnabled):
            return
    patterns = {name: value for name, value in _selection(spec).items() if name.endswith("patterns")}
    names = list(filter_repo_objects(files, **patterns))
    if missing := [name for name in names if not (root / name).is_file()]:
        raise NetworkError(f"{spec} could not be downloaded whole: {missing} did not arrive; load it again")
    path = _list_of(root, spec.subfolder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names), "utf-8")


def _selection(spec: HubSpec) -> dict[str, object]:
    """What of a repository to download: this folder's files, not those of folders below."""
    return {
        "repo_id": spec.repo_id,
        "revision": spec.revision,
        "allow_patterns": [spec.path(pattern) for pattern in PATTERNS],
        "ignore_patterns": [spec.path("*/*")],
    }


def _asked(spec: HubSpec, hub: HubOptions, ask: Callable[[], T]) -> T:
    """What `ask` gives, tried again while the Hub says that it may answer later."""
    for number in range(1, hub.tries + 1):
        try:
            with _translated(spec):
                return ask()
        except NetworkError as error:
            answer = _cause(error, HfHubHTTPError)
            if answer is None or answer.response.status_code not in PASSING or number == hub.tries:
                raise
            wait = pause(answer, number)
            logger.warning("%s Trying again in %.0f s (%d of %d).", error, wait, number + 1, hub.tries)
            hub.sleep(wait)
    raise ValueError(f"tries must be at least 1; got {hub.tries}")


def _cause(error: BaseException | None, kind: type[E]) -> E | None:
    """The first of a kind among an error and its causes; None if there is none."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def _not_the_hub(spec: HubSpec, error: BaseException) -> str:
    return (
        f"what answered for {spec} is not the Hub ({reason(error)}): perhaps a proxy, or the page of a network that "
        "wants you to log in. Check HF_ENDPOINT and the network"
    )


def pause(error: Exception, number: int) -> float:
    """Seconds before try `number` + 1: what the Hub asks for, or twice as many every time; a minute at most."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(LONGEST_WAIT, float(asked) if asked.isdigit() else 2.0**number)


def _said(spec: HubSpec, error: HfHubHTTPError) -> str:
    """A status that is no success, in a sentence."""
    status, said = error.response.status_code, error.server_message or reason(error)
    if status == 429:
        return f"the Hub asks for fewer requests (429: {said}), so {spec} was not pulled; wait some minutes"
    if status == 503:
        return f"the Hub is not available at the moment (503: {said}), so {spec} was not pulled; try later"
    if status >= 500:
        return f"the Hub has a problem of its own ({status}: {said}), so {spec} was not pulled; try later"
    return f"the Hub answered {status} for {spec}: {said}"


@contextmanager
def _translated(spec: HubSpec) -> Iterator[None]:
    """Says in this project's errors what the Hub's client says in its own."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise MissingRevisionError(f"{spec.repo_id} has no branch, tag or commit {spec.revision!r}") from error
    except GatedRepoError as error:
        raise MissingCheckpointError(
            f"{spec.repo_id} is gated: ask for access on its page, then log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise MissingCheckpointError(
            f"there is no folder {str(spec)!r} here, and no repository {spec.repo_id!r} on the Hub that you may read; "
            "for a private one log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, DryRunError, OfflineModeIsEnabled, TransportError) as error:
        if (answer := _cause(error, HfHubHTTPError)) is not None:
            raise NetworkError(_said(spec, answer)) from answer
        if (stranger := _cause(error, FileMetadataError)) is not None:
            raise NetworkError(_not_the_hub(spec, stranger)) from error
        raise NetworkError(
            f"{spec} is not in the cache, and the Hub cannot be reached ({reason(error)}). Check the network, or "
            "HF_HUB_OFFLINE; a local folder works without either"
        ) from error
    except EntryNotFoundError as error:
        raise MissingCheckpointError(f"{spec} holds no model: {reason(error)}") from error
    except HfHubHTTPError as error:
        raise NetworkError(_said(spec, error)) from error
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, FileMetadataError) as error:
        raise NetworkError(_not_the_hub(spec, error)) from error
    except OSError as error:  # the disk, or a download that is not what was announced
        raise NetworkError(f"{spec} could not be downloaded: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The innermost cause of a client's error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


class _Limited(tqdm):
    """A progress bar that stops a download when it passes the size that was announced."""

    def __init__(self, *args, name: str | None = None, initial: int = 0, **kwargs):
        self.counts = name in ("huggingface_hub.snapshot_download", "huggingface_hub.http_get")
        self.done = initial or 0
        super().__init__(*args, name=name, initial=initial, **kwargs)

    def update(self, n: float | None = 1) -> bool | None:
        if self.counts:
            self.done += n or 0
            _check_total(self.done, self.total)
        return super().update(n)


def _check_total(done: float, total: float | None) -> None:
    if total and done > total:
        raise NetworkError(f"the download was stopped: {int(done):,} bytes came, and {int(total):,} were announced")


class _Silent(tqdm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "disable": True})


def _reporting(progress: Progress) -> type[tqdm]:
    """A progress bar that shows nothing and tells `progress` of the one bar that counts bytes written."""

    class Reporting(tqdm):
        def __init__(self, *args, name: str | None = None, **kwargs):
            self.counts = name == "huggingface_hub.snapshot_download"
            self.done = 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.counts:
                self.done += int(n or 0)
                _check_total(self.done, self.total)
                progress(self.done, int(self.total or 0))

    return Reporting
