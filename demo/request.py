"""What a visitor, a link or an endpoint asks for, checked and turned into settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import QueryParams

from .components.address import AddressView
from .models import ModelStore
from .runs import Settings
from .text import clean

_SETTINGS = TypeAdapter(Settings)
OPTIONS = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
FIELDS = ("prompt", "models", *OPTIONS)


class RequestError(ValueError):
    """Something asked for that cannot be done; the message lists all that is wrong."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


def read_settings(values: Mapping[str, Any], store: ModelStore) -> Settings:
    """Settings from untrusted values, by field name; what is not given takes its default.

    Raises:
        RequestError: naming everything that is wrong with them.
    """
    values = {name: _cleaned(value) for name, value in values.items()}
    problems = _prompt_problems(values.get("prompt"), store) + _model_problems(values.get("models"), store)
    settings = None
    length = min(OPTIONS["max_new_tokens"], store.limits.new_tokens)
    try:
        settings = _SETTINGS.validate_python({"prompt": "", "models": (), "max_new_tokens": length, **values})
    except ValidationError as error:
        problems += [_explain(detail) for detail in error.errors() if detail["loc"][0] in OPTIONS]
    if settings and settings.max_new_tokens > store.limits.new_tokens:
        problems.append(f"Length: at most {store.limits.new_tokens} tokens here.")
    if problems:
        raise RequestError(problems)
    return settings


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    return [_cleaned(item) for item in value] if isinstance(value, list | tuple) else value


def _prompt_problems(prompt: Any, store: ModelStore) -> list[str]:
    limit = store.limits.prompt_characters
    if not isinstance(prompt, str) or not prompt:
        return ["The prompt is empty: write a few words for the models to continue."]
    if len(prompt) > limit:
        return [f"The prompt has {len(prompt):,} characters; at most {limit:,} are read. Shorten it."]
    return []


def _model_problems(models: Any, store: ModelStore) -> list[str]:
    if not isinstance(models, list | tuple) or not models:
        return ["No model is chosen: tick at least one."]
    if len(models) > store.limits.models_per_run or len(set(map(str, models))) < len(models):
        return [f"Choose up to {store.limits.models_per_run} different models."]
    unknown = [str(name)[:80] for name in models if name not in store.names()]
    return [f"No model {', '.join(unknown)}; there are: {', '.join(store.names())}."] if unknown else []


def _explain(detail: Any) -> str:
    name = str(detail["loc"][0]).replace("_", " ").capitalize()
    return f"{name}: {detail['msg'].replace('Input should', 'should')}."


@dataclass(frozen=True)
class Link:
    """What the page's address asks the generate tab for.

    Attributes:
        settings: what is usable of it, by field name.
        problems: what is not, in words.
        prompt_given: whether it names a prompt, and so asks for a run.
    """

    settings: dict[str, Any]
    problems: list[str]
    prompt_given: bool

    @property
    def runs(self) -> bool:
        """Whether it can be run."""
        return self.prompt_given and not self.problems


def from_query(query: QueryParams, store: ModelStore) -> Link:
    """Reads the page's address, which anyone may have written."""
    given: dict[str, Any] = {name: query[name] for name in ("prompt", *OPTIONS) if name in query}
    if "models" in query:
        given["models"] = tuple(query.getlist("models"))
    usable: dict[str, Any] = {}
    problems: list[str] = []
    filler = {"prompt": "x", "models": store.names()[:1]}
    for name, value in given.items():
        try:
            value = asdict(read_settings({**filler, name: value}, store))[name]
            usable[name] = list(value) if name == "models" else value
        except RequestError as error:
            problems += error.problems
    return Link(usable, problems, "prompt" in query)


def in_address(settings: Settings) -> AddressView:
    """The settings of a run as the page's address holds them; `from_query` reads them."""
    values = asdict(settings)
    listed = {name: list(value) if isinstance(value, tuple) else [f"{value}"] for name, value in values.items()}
    return {"parameters": listed, "push": True}
