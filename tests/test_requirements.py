"""What the code imports is what the requirements name, and what they name is what the tests are run with."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
OWN = {"app", "attention", "trainer", "demo", "benchmarks", "tests"}
CODE = ("app.py", "attention", "trainer", "demo")
OPTIONAL = {"spaces", "lm-eval", "peft"}  # of a ZeroGPU Space, of trainer/tasks.py, and a neighbour of the user's
TOOLS = {"pytest-xdist", "ruff", "peft", "onnx", "onnxscript", "onnxruntime"}  # started, or imported where they are


def normal(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(name: str) -> dict[str, str]:
    """What a file of requirements names, those that it includes as well: the versions allowed by distribution."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found |= declared(line.removeprefix("-r ").strip())
        elif line:
            package, versions = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(.*)", line).groups()
            found[normal(package)] = versions
    return found


def imported(*places: str) -> set[str]:
    """The distributions that the files in folders import from; `OPTIONAL` ones are left out."""
    owners, found = packages_distributions(), set()
    paths = [path for place in places for path in [ROOT / place, *(ROOT / place).rglob("*.py")] if path.is_file()]
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        modules = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OWN
        found |= {normal(owners.get(module, [module])[0]) for module in modules}
    return found - OPTIONAL


def test_every_import_is_declared():
    assert not imported(*CODE) - declared("requirements.txt").keys()
    assert not imported("tests") - declared("requirements-dev.txt").keys()
    measuring = declared("requirements-dev.txt") | declared("requirements-bench.txt")
    assert not imported("benchmarks") - measuring.keys()


def test_what_is_declared_is_used():
    used = imported(*CODE)
    assert not declared("requirements.txt").keys() - used
    assert not declared("requirements-dev.txt").keys() - used - imported("tests") - TOOLS


@pytest.mark.parametrize("name", declared("requirements.txt"))
def test_every_range_has_a_least_version(name):
    assert re.match(r">=[\d.]+(,<\d+)?$", declared("requirements.txt")[name])


def test_the_spaces_gradio_is_one_that_the_requirements_allow():
    page = yaml.safe_load((ROOT / "README.md").read_text(encoding="utf-8").split("---")[1])
    least, below = re.fullmatch(r">=([\d.]+),<(\d+)", declared("requirements.txt")["gradio"]).groups()
    version = tuple(map(int, page["sdk_version"].split(".")))
    assert tuple(map(int, least.split("."))) <= version < (int(below),)
