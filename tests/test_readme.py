"""What the README tells people to type can be typed, and what it promises about loading holds in every file."""

import ast
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import ckpt.__main__ as ckpt
import samplers
import data.encode as encode
import train
from harness.cli import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [match for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
            for match in re.findall(r"(?:python|torchrun[^\n]*?) (train\.py|samplers\.py|ckpt\.py|-m data\.encode)([^\n#&|]*)", block)]


def test_the_commands_are_found():
    assert {script for script, _ in COMMANDS} == {"train.py", "samplers.py", "ckpt.py", "-m data.encode"} and len(COMMANDS) >= 15


@pytest.mark.parametrize("script, args", COMMANDS)
def test_every_command_of_the_readme_parses(script, args):
    words = shlex.split(args)
    assert "..." not in words and "…" not in words
    if script == "train.py":
        cfg, _ = parse(train.Config, argv=words)
        train.resolve(replace(cfg, exclude_tags=("x",)) if cfg.stage == "stage2" else cfg)      # its fine run is not here
    elif script == "samplers.py":
        parse(samplers.Config, argv=words)
    elif script == "-m data.encode":
        parse(encode.Encode, argv=words)
    else:
        (command, *names), flags = ckpt.positional(words)
        assert len(names) == len(ckpt.COMMANDS[command])
        parse(ckpt.Options, argv=flags)


def test_the_python_of_the_readme_compiles_and_imports_every_name_it_uses():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        tree = ast.parse(block)
        names = {"load": set(), "store": set(vars(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                names["load" if isinstance(node.ctx, ast.Load) else "store"].add(node.id)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names["store"] |= {a.asname or a.name for a in node.names}
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(__import__(node.module), a.name) for a in node.names), node.module
        assert names["load"] <= names["store"], names["load"] - names["store"]


def calls(path):
    """(line, name of what is called, {keyword: constant}) of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), {k.arg: getattr(k.value, "value", None) for k in node.keywords}


def test_nothing_is_loaded_in_part_and_no_pickle_is_run():
    files = [p for p in ROOT.rglob("*.py") if not any(part.startswith(".") or part in ("venv", "runs") for part in p.relative_to(ROOT).parts)]
    found = [(path, line, name, keywords) for path in files for line, name, keywords in calls(path)]
    assert {"files.py", "ckpt.py", "model.py", "conftest.py"} <= {p.name for p in files} and any(name == "torch.load" for _, _, name, _ in found)
    assert [(p.name, line) for p, line, name, keywords in found if name != "zip" and keywords.get("strict", True) is not True] == []
    # A test may read back an optimizer that it wrote a line before.
    assert [(p.name, line) for p, line, name, keywords in found if name == "torch.load" and keywords.get("weights_only") is not True
            and p.name != "test_adamw8bit.py"] == []
