"""What tabs keep in the page's address, so that reload, Back and a link bring it back."""

from __future__ import annotations

import json
from collections.abc import Sequence

from starlette.datastructures import QueryParams

from .components.address import AddressView


def in_address(push: bool = False, **parameters: list[str]) -> AddressView:
    """Parameters for `session.address`, each with its values; those with none are taken out."""
    return {"parameters": parameters, "push": push}


def copy_link(said: str, needed: str = "", without: str = "") -> str:
    """JavaScript that copies the page's address, for a button whose one output is a `Notices`.

    Args:
        said: what to say once it is copied.
        needed: a parameter without which the address is no link, and `without`, what to say then.
    """
    return f"""async () => {{
      const say = (text) => [[{{ level: "info", text }}]]; // a list of outputs, of which there is one
      const needed = {json.dumps(needed)};
      if (needed && !new URLSearchParams(location.search).has(needed)) return say({json.dumps(without)});
      try {{
        await navigator.clipboard.writeText(location.href);
        return say({json.dumps(said)});
      }} catch {{
        window.prompt("Link to this page", location.href);
        return [[]];
      }}
    }}"""


def number_in(query: QueryParams, name: str, default: int, problems: list[str]) -> int:
    """A whole number of at least 0 from the address, which anyone may have written.

    Args:
        default: for an address without it, and for anything else, which is added to the problems.
    """
    value = query.get(name)
    if value is None:
        return default
    if value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    problems.append(f"In the link {name} is {value[:80]!r}; it must be a whole number from 0.")
    return default


def unknown_models(asked: Sequence[str], names: Sequence[str]) -> list[str]:
    """What to say of models that a link asks for and that are not here."""
    gone = [repr(name[:80]) for name in asked if name not in names]
    return [f"The link asks for {', '.join(gone)}; there are: {', '.join(names)}."] if gone else []
