"""What `make` hands to pip."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDER = """#!/bin/sh
for word; do printf '%s\\n' "$word"; done >> "$0.words"
echo --- >> "$0.words"
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("option", "words"),
    [
        (None, ["torch==2.13.0"]),
        ("torch==2.13.0 --index-url https://host/whl/cpu", ["torch==2.13.0", "--index-url", "https://host/whl/cpu"]),
        ("torch>=2.9,<3", ["torch>=2.9,<3"]),
        ("torch[opt-einsum]==2.13.0+cpu *", ["torch[opt-einsum]==2.13.0+cpu", "*"]),
    ],
)
def test_torch_is_words_of_pips_command_line(option: str | None, words: list[str], tmp_path: Path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "--silent", ".venv/.installed", *([] if option is None else [f"TORCH={option}"])]
    subprocess.run(command, cwd=tmp_path, check=True)
    first = (python.parent / "python.words").read_text().split("---\n")[0].splitlines()
    assert first == ["-m", "pip", "install", "--quiet", *words]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".venv", "Makefile", "requirements.txt"]
