"""Pushing variants to the Hub: one commit, with the code that loads them."""

from __future__ import annotations

import logging
import posixpath
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .errors import CheckpointError, PushError
from .files import (
    CARD,
    MANIFEST,
    OWN_WEIGHTS,
    check,
    expanded,
    read_json,
    read_manifest,
    weight_files,
    write_json,
    write_manifest,
    write_weights,
)
from .hub import HUB, HubOptions, HubSpec, TransportError, pause, reason
from .saving import save_model
from .stored import Stored, locate, open_stored, whole_weights

logger = logging.getLogger(__name__)

ANY_REPOSITORY = '"user/repo"'  # in a card's snippets
IMAGES = (".png", ".svg")


@dataclass(frozen=True)
class Push:
    """What was pushed, or would be.

    Attributes:
        spec: what `attention.load` takes to get it; by commit, once it is there.
        files: bytes by path in the repository.
        url: of the commit; None for a dry run.
    """

    spec: str
    files: dict[str, int]
    url: str | None = None


def push(
    folder: str | Path,
    to: str,
    *,
    private: bool = False,
    revision: str | None = None,
    include_base: bool | None = None,
    dry_run: bool = False,
    message: str | None = None,
    api: HfApi | None = None,
    tries: int = 4,
    sleep: Callable[[float], object] = time.sleep,
) -> Push:
    """Pushes a variant in one commit; files of the repository that are not its own stay as they are.

    With it goes the code of this package that it needs, so that `AutoModelForCausalLM.from_pretrained(...,
    trust_remote_code=True)` works without the package. `attention.load` never runs that code.

    Args:
        folder: what `save` wrote. Images in it go along, for the card.
        to: "user/repo[/subfolder][@revision]"; the repository is made if there is none.
        private: whether a new repository is.
        revision: a branch; made if there is none.
        include_base: push all weights instead of those that differ from the base. By default for a base in a local
            folder, which others do not have. False is possible for such a base if it lies in the same repository:
            "../base" for a variant in "user/repo/masks" is "user/repo/base".
        dry_run: only say what would be pushed; the network is not used.
        message: of the commit.
        api: endpoint and token; by default those of the environment.
        tries: how often to try where it may help, with growing pauses.
        sleep: waits some seconds.

    Raises:
        PushError: whatever happened on the way; it says whether a retry may help, and the command for it.
        CheckpointError: if the folder is no intact variant.
    """
    spec = HubSpec.parse(to)
    spec = replace(spec, revision=revision or spec.revision)
    command = _command(expanded(folder).absolute(), spec, private, include_base)
    with tempfile.TemporaryDirectory() as work:
        publish(locate(Path(folder)), Path(work), spec, include_base, HubOptions(api))
        _check_card(Path(work, CARD), command)
        _address_card(Path(work, CARD), Path(folder), spec)
        method = read_json(Path(work, "config.json"))["attention"]["method"]
        message = message or f"Upload a {method} variant"
        files = {path.name: path for path in Path(work).iterdir()}
        sizes = {spec.path(name): path.stat().st_size for name, path in sorted(files.items())}
        if dry_run:
            return Push(str(spec), sizes)
        client = api or HfApi()
        done = _persistently(lambda: commit(client, spec, files, message, private=private), command, tries, sleep)
    return Push(str(replace(spec, revision=done.oid)), sizes, done.commit_url)


def push_model(
    model: PreTrainedModel,
    to: str,
    message: str | None,
    private: bool,
    token: bool | str | None,
    revision: str | None,
) -> str:
    """What `push_to_hub` does; returns the commit's address."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "variant")
        save_model(model, folder)
        done = push(folder, to, private=private, revision=revision, message=message, api=HfApi(token=token))
    return str(done.url)


def publish(folder: Path, work: Path, spec: HubSpec, include_base: bool | None, hub: HubOptions = HUB) -> None:
    """Copies a variant into the empty folder `work`, as it is to lie on the Hub at `spec`.

    Raises:
        CheckpointError: if it is no intact variant, or is being replaced at this moment.
    """
    try:
        images = [path.name for path in folder.iterdir() if path.suffix in IMAGES]
        for name in [MANIFEST, *read_manifest(folder), *images]:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, work / name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} changed while it was read; push it again") from error
    check(work)
    config = read_json(work / "config.json")
    if _includes_base(config.get("base"), spec, include_base):
        _write_all_weights(work, open_stored(folder), config, hub)
    config["auto_map"] = _copy_code(work, spec)
    write_json(work / "config.json", config)
    write_manifest(work)


def _write_all_weights(work: Path, stored: Stored, config: dict[str, Any], hub: HubOptions) -> None:
    """Puts the base's tensors beside the variant's, and takes the base out of the config."""
    weights = {name: tensor.clone() for name, tensor in whole_weights(stored, hub).items()}
    for path in weight_files(work):
        path.unlink()
    write_weights(work, weights)
    del config["base"]


def _copy_code(work: Path, spec: HubSpec) -> dict[str, str]:
    """Copies the modules that the model needs; returns the `auto_map` that names its classes."""
    module = Path(__file__).with_name("variant.py")
    for source in {module, *map(Path, get_relative_import_files(module))}:
        shutil.copyfile(source, work / source.name)
    prefix = spec.path(module.stem)
    return {"AutoConfig": f"{prefix}.VariantConfig", "AutoModelForCausalLM": f"{prefix}.Variant"}


def commit(api: HfApi, spec: HubSpec, files: dict[str, Path], message: str, *, private: bool) -> CommitInfo:
    """Adds files to a repository in one commit on top of its newest one; makes the repository and branch if needed.

    Weights that an earlier version left in the same folder are deleted; all other files stay.

    Args:
        files: what to add, by name inside the spec's folder.
        private: only for a repository that does not exist yet.
    """
    api.create_repo(spec.repo_id, private=private or None, exist_ok=True)
    if spec.revision is not None and not spec.revision.startswith("refs/"):
        api.create_branch(spec.repo_id, branch=spec.revision, exist_ok=True)
    head = api.model_info(spec.repo_id, revision=spec.revision)
    added = {spec.path(name): path for name, path in files.items()}
    stale = [
        sibling.rfilename
        for sibling in head.siblings or []
        if sibling.rfilename not in added and _is_own_weights(sibling.rfilename, spec)
    ]
    return api.create_commit(
        spec.repo_id,
        [
            *(CommitOperationAdd(name, path) for name, path in added.items()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=message,
        revision=spec.revision,
        parent_commit=head.sha,
    )


def _is_own_weights(path: str, spec: HubSpec) -> bool:
    name = posixpath.basename(path)
    return path == spec.path(name) and OWN_WEIGHTS.fullmatch(name) is not None


def _includes_base(base: dict[str, Any] | None, spec: HubSpec, include_base: bool | None) -> bool:
    if base is None:
        return False
    local = base["id"].startswith(".")
    if include_base is None:
        return local
    if local and not include_base and posixpath.normpath(posixpath.join(spec.subfolder, base["id"])).startswith(".."):
        raise CheckpointError(
            f"the base {base['id']} would lie outside the repository {spec.repo_id}; push the variant to a subfolder "
            "beside its base, or with the base (include_base=True)"
        )
    return include_base


def _check_card(path: Path, command: str) -> None:
    """Parses the card's metadata, `model-index` included, as the Hub's client does."""
    if not path.is_file():
        logger.warning("the variant has no %s, so its page on the Hub will be empty, or stay what it is", path.name)
        return
    try:
        ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except Exception as error:  # yaml's errors have no common class with the others
        raise PushError(f"The metadata of {path.name} is not valid: {error}.", retry=False, command=command) from error


def _address_card(path: Path, folder: Path, spec: HubSpec) -> None:
    """Has the snippets of a card name the place on the Hub instead of the folder that is pushed."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    for place in set(re.findall(r'attention\.load\("([^"\n]+)"\)', text)):
        if expanded(place).absolute() == expanded(folder).absolute():
            text = text.replace(f'attention.load("{place}")', f'attention.load("{spec}")')
    path.write_text(text.replace(ANY_REPOSITORY, spec.arguments), encoding="utf-8", newline="\n")


def _persistently(
    attempt: Callable[[], CommitInfo], command: str, tries: int, sleep: Callable[[float], object]
) -> CommitInfo:
    """Runs `attempt` until it succeeds, cannot, or was tried often enough."""
    for number in range(1, tries + 1):
        try:
            return attempt()
        except Exception as error:  # of the Hub's client, of Xet and of what they are built on
            what, retry = _explain(error)
            if not retry or number == tries or isinstance(error, OfflineModeIsEnabled):
                raise PushError(what, retry=retry, command=command) from error
            wait = pause(error, number)
            logger.warning("%s Trying again in %.0f s (%d of %d).", what, wait, number + 1, tries)
            sleep(wait)
    raise ValueError(f"tries must be at least 1; got {tries}")


def _explain(error: Exception) -> tuple[str, bool]:
    """What went wrong, in a sentence or two, and whether trying again may help."""
    if isinstance(error, TransportError | OfflineModeIsEnabled):
        return f"The Hub could not be reached, or stopped answering ({reason(error)}).", True
    if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError):
        return f"Files could not be uploaded to where the Hub wants them ({reason(error)}).", True
    if not isinstance(error, HfHubHTTPError):
        cause = str(error) if isinstance(error, ValueError) else reason(error)
        return f"The Hub's client refuses the commit: {cause}.", not isinstance(error, ValueError)
    status = error.response.status_code
    said = error.server_message or reason(error)
    if status == 401:
        return f"The Hub does not know who you are ({said}). Log in with `hf auth login`.", False
    if status == 403:
        return f"Your token may not write there ({said}). Log in with one that may.", False
    if status == 404:
        return f"The Hub finds no such repository or branch ({said}).", False
    if status in (409, 412):
        return "Somebody else changed the repository at the same time.", True
    if status == 429:
        return f"The Hub asks for fewer requests ({said}).", True
    if status >= 500 or status == 408:
        return f"The Hub has a problem of its own ({status}: {said}).", True
    return f"The Hub refuses the commit ({status}: {said}).", False


def _command(folder: Path, spec: HubSpec, private: bool, include_base: bool | None) -> str:
    parts = ["python", "-m", "attention.checkpoint", "push", str(folder), spec.name]
    if private:
        parts.append("--private")
    if spec.revision is not None:
        parts += ["--revision", spec.revision]
    if include_base is not None:
        parts.append("--include_base" if include_base else "--no-include_base")
    return shlex.join(parts)
