"""Components: what keeps text from being executed, and how numbers travel to them."""

import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demo import components
from demo.components.canvas import TEMPLATE, ScriptedHTML
from demo.components.maps import pack_bytes, pack_triangle

FOLDER = Path(components.__file__).parent
CLASSES = [getattr(components, name) for name in components.__all__]
HOSTILE = ["<img src=x onerror=alert(1)>", "${alert(1)}", "{{value}}", "`", "\u202e"]


@pytest.mark.parametrize("component", CLASSES, ids=lambda each: each.__name__)
def test_nothing_of_a_value_reaches_a_template(component: type[ScriptedHTML]):
    config = component(HOSTILE).get_config()
    assert config["html_template"] == TEMPLATE
    assert config["value"] == HOSTILE
    assert config["props"] == {}  # which an event would take away that leaves the component as it is
    for template in (config["html_template"], config["css_template"]):
        assert not re.search(r"\$\{|\{\{|`|\\", template)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.js")), ids=lambda file: file.name)
def test_scripts_cannot_turn_text_into_markup_or_leave_the_page(file: Path):
    script = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|https?://|fetch\(|import\("
    )
    assert re.findall(forbidden, script) == []


@given(st.integers(1, 12), st.integers(0, 2**31))
def test_pack_triangle_keeps_rows_in_order(length: int, seed: int):
    matrix = torch.rand(length, length, generator=torch.Generator().manual_seed(seed))
    packed = np.frombuffer(b64decode(pack_triangle(matrix)), dtype="<f2")
    assert len(packed) == length * (length + 1) // 2
    for i in range(length):
        start = i * (i + 1) // 2
        np.testing.assert_allclose(packed[start : start + i + 1], matrix[i, : i + 1], rtol=1e-3)


def test_pack_bytes_covers_the_range():
    values = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    assert list(b64decode(pack_bytes(values))) == [0, 0, 128, 255, 255]
