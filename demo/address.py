"""What tabs keep in the page's address, so that reload, Back and a link bring it back."""

from __future__ import annotations

from starlette.datastructures import QueryParams

from .components.address import AddressView


def in_address(push: bool = False, **parameters: list[str]) -> AddressView:
    """Parameters for `session.address`, each with its values; those with none are taken out."""
    return {"parameters": parameters, "push": push}


def number_in(query: QueryParams, name: str, default: int) -> int:
    """A whole number of at least 0 from the address, which anyone may have written; `default` for anything else."""
    value = query.get(name, "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else default
