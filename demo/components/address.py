"""The page's address, set from Python."""

from __future__ import annotations

from typing import Any, TypedDict

from .canvas import ScriptedHTML


class AddressView(TypedDict):
    """Parameters of the address, by name; an empty list takes one out, and what is not named stays as it is."""

    parameters: dict[str, list[str]]
    push: bool  # whether Back returns to what was there before


class Address(ScriptedHTML):
    """Shows nothing; puts parameters into the page's address, and loads the page anew on Back and Forward.

    What would make the address longer than servers take is left out of it.

    Args:
        value: what to put there; every output adds to what is in the address.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: AddressView | None = None, **kwargs: Any):
        super().__init__(value, scripts=("address.js",), styles=(), **kwargs)
