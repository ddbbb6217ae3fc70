"""Line charts in a grid."""

from __future__ import annotations

from typing import Any, TypedDict

from .canvas import ScriptedHTML


class Axis(TypedDict, total=False):
    """An axis; what is not given follows from the data."""

    label: str
    unit: str
    log: bool
    min: float
    max: float
    ticks: list[float]


class Series(TypedDict, total=False):
    """A curve; `points` are [x, y] in rising x, y None where the curve breaks off; `spread` are [x, low, high] bars."""

    name: str
    color: int  # 0: neutral, for a baseline; 1 to 6: told apart by colour-blind readers too
    shade: float  # instead of a colour, for curves that are in an order: 0 is light, 1 dark
    dashed: bool
    dots: bool
    points: list[list[float | None]]
    spread: list[list[float]]


class Event(TypedDict, total=False):
    """A vertical line with a label; `color` is that of a series."""

    x: float
    label: str
    color: int


class Chart(TypedDict, total=False):
    """One chart."""

    title: str
    note: str
    x: Axis
    y: Axis
    series: list[Series]
    events: list[Event]
    height: int


class Curves(ScriptedHTML):
    """Charts in a grid; the pointer or the arrow keys read all curves of a chart at one x.

    Args:
        value: the charts.
        empty: what to say while there are none.
        room: height kept free for them meanwhile, in pixels.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(
        self, value: list[Chart] | None = None, *, empty: str = "Nothing to show yet.", room: int = 120, **kwargs: Any
    ):
        scripts, styles = ("chart.js", "curves.js"), ("chart.css", "curves.css")
        super().__init__(value, scripts=scripts, styles=styles, options={"empty": empty, "room": room}, **kwargs)
