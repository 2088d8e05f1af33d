"""What benchmarks/gpu_day.sh says that a part needs is all that it needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "benchmarks" / "gpu_day.sh").read_text()
MODULES = {
    "selfcheck": "kernels.selfcheck",
    "host": "benchmarks.host",
    "bench": "benchmarks.kernels",
    "step": "benchmarks.kernels",
    "encode": "data.encode",
    "train": "train",
    "graph": "train",
    "distill": "benchmarks.distill, experiments.ablate",
    "compare": "experiments.compare",
    "architecture": "experiments.architecture",
    "prompts": "train",
    "sdxl": "benchmarks.sdxl_step",
    "boost": "benchmarks.boosting_sd",
}
# Beside torch and triton. Their names on PyPI, where they are imported by another.
PACKAGES = {"safetensors", "huggingface_hub", "PIL", "tqdm", "scipy", "matplotlib"}
IMPORTED = {"pillow": "PIL"}
IMPORT = """
import sys
for name in {absent}:
    sys.modules[name] = None
import {modules}
"""


def needs(part: str) -> set[str]:
    """The packages that a part needs, as the script's head says."""
    text = re.search(rf"^#   {part} .*?needs (.*?)(?:[,;]|\n#   \w|\n#\n)", SCRIPT, re.M | re.S)
    return {IMPORTED.get(word, word) for word in re.findall(r"\w+", text[1])}


@pytest.mark.parametrize("part, modules", MODULES.items(), ids=MODULES)
def test_a_part_needs_no_package_that_is_not_named(part, modules):
    absent = sorted(PACKAGES - needs(part))
    code = IMPORT.format(absent=absent, modules=modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
