"""How often files are opened when the bundled models are loaded into one process."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]

# In a process of its own: hooks on opening files stay for good, and no other test has read the base before.
SCRIPT = """
import json, sys
from pathlib import Path
from safetensors import safe_open
import attention
from attention import files

opened = []

def of_a_tokenizer(frame):  # whose class in transformers looks into config.json by itself
    while frame is not None:
        if "tokenization" in frame.f_globals.get("__name__", ""):
            return True
        frame = frame.f_back
    return False

def look(event, arguments):
    if event != "open" or not isinstance(arguments[0], str) or "r" not in (arguments[1] or "r"):
        return
    if not of_a_tokenizer(sys._getframe(1)):
        opened.append(arguments[0])

def counted(path, *args, **kwargs):  # it opens in Rust, which no hook sees
    opened.append(str(path))
    return safe_open(path, *args, **kwargs)

sys.addaudithook(look)
files.safe_open = counted
base = None
for folder in map(Path, sys.argv[1:]):
    if base is None:
        base, _ = attention.load(folder)
    else:
        attention.load(folder, base=base)
print(json.dumps(opened))
"""


def test_each_file_of_the_bundled_models_is_opened_once():
    folders = [ROOT / "checkpoints" / "base"]
    folders += sorted(path for path in (ROOT / "checkpoints").iterdir() if (path / "manifest.json").is_file())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folders)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = Counter(Path(path).resolve() for path in json.loads(done.stdout.splitlines()[-1]))
    expected = [path for folder in folders for path in (folder / "config.json", *folder.glob("model*.safetensors"))]
    assert {str(path.relative_to(ROOT)): counts[path.resolve()] for path in expected} == {
        str(path.relative_to(ROOT)): 1 for path in expected
    }
