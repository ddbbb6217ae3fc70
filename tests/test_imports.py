"""Who may import whom: down the tiers of attention/, never up the layers, in no circle, at the top of a file.

And who knows families of models: attention/families.py.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("attention", "trainer", "demo", "benchmarks")
LAYERS = {"attention": (), "trainer": ("attention",), "demo": ("attention", "trainer"), "benchmarks": PACKAGES}
TIERS = (
    ("words", "errors mechanism state reference padding prompts"),
    ("kernels", "block_attention masks_plan nsa_kernel performer_kernel"),
    ("methods", "softmax masks masks_content performer performer_features nsa"),
    ("choice", "registry"),
    ("storage", "files hub examine stored saving pushing"),
    ("model", "variant"),
    ("families", "families"),
    (
        "entry points",
        "convert recording loading linear adapters compiled contract contract_checks export checkpoint __init__",
    ),
)
TIER = {name: number for number, (_, names) in enumerate(TIERS) for name in names.split()}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# Families, and what their parts are called.
FAMILY = re.compile(
    r"gpt|llama|mistral|qwen|neox|\bopt\b|phi-?3|olmo|smollm|wpe|wte|c_attn|self_attn|lm_head|embed_tokens"
    r"|transformer\.h\b|model\.layers|\bn_(embd|layer|head|positions)\b",
    re.IGNORECASE,
)
TEXTS = (".py", ".yaml", ".js", ".css")
NAMED = {  # files that may name some
    "trainer/study/report.py": "the study that the project began with, of one family",
    "trainer/recipes/pretrain.yaml": "recipes start from a model, and say which",
    "trainer/recipes/gpt2-wikitext2-masks.yaml": "",
    "trainer/recipes/gpt2-wikitext2-nsa.yaml": "",
    "trainer/recipes/gpt2-wikitext2-performer.yaml": "",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The project's own modules that a file imports, anywhere in it."""
    package = [*path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    known = {name for name in found if name in MODULES}
    return {name for name in known if not any(other.startswith(f"{name}.") for other in known)} or known


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_layers_hold(path):
    own = path.relative_to(ROOT).parts[0]
    allowed = {own, *LAYERS[own]}
    assert {name.split(".")[0] for name in imported(path)} <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "attention").glob("*.py")), ids=lambda path: path.stem)
def test_attention_imports_down_its_tiers_only(path):
    own = TIER[path.stem]
    for name in imported(path):
        other = TIER[name.rpartition(".")[2] if "." in name else "__init__"]
        assert other <= own, f"{path.stem} ({TIERS[own][0]}) imports {name} ({TIERS[other][0]})"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_module_of_the_project_is_imported_inside_a_function(path):
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom):
                    assert not node.level, node.lineno
                    assert (node.module or "").split(".")[0] not in PACKAGES, node.lineno
                elif isinstance(node, ast.Import):
                    assert all(alias.name.split(".")[0] not in PACKAGES for alias in node.names), node.lineno


def test_there_is_no_circle():
    TopologicalSorter({name: imported(path) - {name} for name, path in MODULES.items()}).prepare()


def test_trainer_and_demo_know_no_family():
    files = [ROOT / "app.py", *(path for package in ("trainer", "demo") for path in (ROOT / package).rglob("*"))]
    named = [path for path in files if path.suffix in TEXTS and FAMILY.search(path.read_text(encoding="utf-8"))]
    assert {path.relative_to(ROOT).as_posix() for path in named} == NAMED.keys()
