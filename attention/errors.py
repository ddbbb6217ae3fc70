"""What can go wrong with a checkpoint, on disk or on the Hub."""

from __future__ import annotations

LONGEST_MESSAGE = 3000  # characters; the names in a stranger's files may be longer


class CheckpointError(OSError):
    """A checkpoint could not be read, written or moved; the message says what to do.

    An `OSError`, as transformers raises where a model cannot be loaded.
    """

    def __init__(self, message: str):
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE // 2]} [...] {message[-LONGEST_MESSAGE // 2 :]}"
        super().__init__(message)


class MissingCheckpointError(CheckpointError):
    """There is no such folder, repository or subfolder, or no permission to see it."""


class MissingRevisionError(CheckpointError):
    """The repository has no such branch, tag or commit."""


class NotAModelError(CheckpointError):
    """What was found is neither a variant nor a causal language model in safetensors."""


class BrokenCheckpointError(CheckpointError):
    """Files of a variant are missing, cut short or changed since they were written.

    Attributes:
        problems: one sentence a file.
    """

    def __init__(self, folder: object, problems: list[str]):
        self.problems = problems
        advice = "Copy or download it again; a change made on purpose needs attention.save."
        super().__init__("\n  - ".join([f"{folder} is damaged. {advice}", *problems]))


class WrongBaseError(CheckpointError):
    """The base is missing, or its weights are not those that the variant was made from."""


class NetworkError(CheckpointError):
    """The Hub did not answer as it should, and the cache does not hold what was asked for."""


class UnsupportedModelError(ValueError):
    """A model whose attention cannot be swapped.

    Attributes:
        reasons: what stands in the way, a sentence each.
    """

    def __init__(self, model: object, reasons: list[str]):
        self.reasons = reasons
        super().__init__(f"the attention of a {type(model).__name__} cannot be swapped: {'; '.join(reasons)}")


class PushError(CheckpointError):
    """A variant did not reach the Hub; the local folder is as it was.

    Attributes:
        retry: whether the same push may succeed later, with nothing changed.
        command: the shell command that pushes it.
    """

    def __init__(self, message: str, *, retry: bool, command: str):
        self.retry = retry
        self.command = command
        super().__init__(f"{message} Nothing is lost: {'try later' if retry else 'then run'}\n  {command}")
