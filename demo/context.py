"""What the tabs share: the models, the limits, and the state of one visitor.

Each tab is built by one function, called by `page.build` inside `gr.Tabs`:

    def build_<name>_tab(app: App, session: Session) -> gr.Tab

It makes its own `gr.Tab(id="<name>")`, names its components with `elem_id`s that start with "<name>-", and answers:
- `session.runs.change`: the visitor's runs changed, newest first (`list[Run]`); fires also when a link or the cached
  example fills the page.
- `session.address`: an output of any event whose result should survive a reload: an `AddressView` with the parameters
  that the tab owns (`tab`, which the page keeps, and the settings of `/generate` are taken); read them back from
  `gr.Request.query_params` in `session.blocks.load`.
- `session.names.change`: the models that can be chosen changed (`list[str]`); every picker sets its choices from it.

Events that compute take a lane: `**app.lane(VIEW)` gives `concurrency_id` and `concurrency_limit`, and lanes do not
wait for one another. Endpoints are `gr.api(..., api_name=...)` functions with typed docstrings; events of the page
itself are `api_visibility="private"`.

Tokens are shown by one component everywhere, `components.tokens.TokenColumns`: its value is `list[ColumnView]`,
columns side by side in a grid, text only ever set through textContent; it streams (only what was added to a value is
sent, read and painted), colours by `score`, and shows `details`, `top` and `base_top` in a card for the hovered or
focused token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from .components.address import Address
from .limits import Limits
from .models import ModelStore

GENERATE, VIEW, MEASURE = "generate", "view", "measure"


@dataclass(frozen=True)
class App:
    """What every tab builder gets."""

    store: ModelStore

    @property
    def limits(self) -> Limits:
        return self.store.limits

    def lane(self, name: str) -> dict[str, Any]:
        """The queue options of an event that computes: one at a time in each lane."""
        return {"concurrency_id": name, "concurrency_limit": 1}


@dataclass(frozen=True)
class Session:
    """State of one visitor, shared by the tabs.

    Attributes:
        blocks: the page, for what happens when it is opened: `session.blocks.load(...)`.
        runs: `list[Run]`, newest first.
        names: `list[str]`, the models that can be chosen; shared by all visitors, refreshed when a page loads.
        costs: `Measured`, what the speed tab found, or None. Gradio takes the first event that leaves a state of a tab
            that is not open as it is for a change of it; so it is the page's.
        address: puts what a tab shows into the page's address, from which its `blocks.load` restores it.
    """

    blocks: gr.Blocks
    runs: gr.State
    names: gr.State
    costs: gr.State
    address: Address
