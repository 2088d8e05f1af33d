"""What README and docs tell people to type can be typed, and what they promise of loading holds."""

import ast
import builtins
import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import train
from harness.cli import parse
from kernels import selfcheck

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
COMMAND = re.compile(
    r"^(?:python|torchrun(?: --nproc_per_node=\d+)?(?: --)?) (-m [\w.]+|[\w/]+\.py)\b(.*)$"
)


def commands() -> list[tuple[str, str, str]]:
    """(page, script or "-m module", arguments) of every command in a bash block."""
    found = []
    for page, text in TEXT.items():
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if match := COMMAND.match(line.strip()):
                    words = shlex.split(match[2], comments=True)
                    found.append((page, match[1], shlex.join(words)))
    return found


COMMANDS = commands()
SCRIPTS = {
    "train.py",
    "samplers.py",
    "distill.py",
    "eval_fid.py",
    "-m ckpt",
    "-m data.encode",
    "-m metrics.inception",
    "-m harness.plot",
    "experiments/ablate.py",
}


def test_the_commands_are_found():
    assert SCRIPTS <= {script for _, script, _ in COMMANDS}
    assert len(COMMANDS) >= 40


def main_of(script: str):
    """The module that a command runs."""
    if script.startswith("-m "):
        name = script[3:]
        package = (ROOT / name.replace(".", "/")).is_dir()
        return importlib.import_module(f"{name}.__main__" if package else name)
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize("page, script, args", COMMANDS)
def test_every_flag_of_a_command_exists_and_its_value_parses(page, script, args):
    own = ("tests/aot.py", "tests/test_text.py", "benchmarks/kernels.py")
    if script in ("-m pytest", *own):
        assert script == "-m pytest" or (ROOT / script).is_file()
        return
    words = shlex.split(args)
    if script == "-m kernels.selfcheck":
        selfcheck.parser().parse_args(words)
        return
    assert "..." not in words and "…" not in words
    module = main_of(script)
    config = getattr(module, "Config", None) or getattr(module, "Options", None)
    if script == "distill.py" and words[:1] == ["pretrain-assessor"]:
        config, words = module.Pretrain, words[1:]
    if script in ("-m data.encode", "text.py"):
        config = module.Encode
    if script == "text.py":
        assert words.pop(0) == "encode"
    if config is None:
        assert script == "-m metrics.inception" and words == ["--fetch"]
        return
    names = []
    while words and not words[0].startswith("-"):
        names.append(words.pop(0))
    allowed = {"-m ckpt": 3, "-m harness.plot": 8, "eval_fid.py": 3, "experiments/compare.py": 3}
    assert len(names) <= allowed.get(script, 0), names
    if script == "eval_fid.py" and names:
        assert names[0] == "compare"
        return
    if script == "experiments/ablate.py":
        module.read(words)
        return
    if script == "experiments/compare.py" and names:
        assert names[0] == "report"
        config = module.runs.Config
    cfg, _ = parse(config, argv=words)
    if script == "train.py":
        # The fine run that stage2 would take its tags from is not here.
        train.resolve(replace(cfg, exclude_tags=("x",)) if cfg.stage == "stage2" else cfg)
    if script == "experiments/compare.py" and not names:
        module.plan_of(cfg)


@pytest.mark.parametrize("page", TEXT)
def test_the_files_that_a_page_names_are_there(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", TEXT[page])
    names = [a or b for a, b in links]
    assert [name for name in names if not (folder / name).exists()] == []


def test_what_a_number_was_measured_with_is_there_today():
    """Results keep the command that was typed; where its script has moved, the page says so."""
    origins = re.findall(r"^<sub>(.*)</sub>$", TEXT["docs/results.md"], re.M)
    scripts = [re.findall(r"[\w/]+\.py\b", line)[-1] for line in origins]
    assert len(scripts) >= 15
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("page", TEXT)
def test_a_line_of_a_page_fits_a_screen(page):
    if page == "docs/results.md":
        pytest.skip("its lines are written by benchmarks/readme.py")
    lines = TEXT[page].splitlines()
    # The rows of a table in docs/ and its small print may be long: Markdown cannot wrap them, and
    # benchmarks/readme.py writes them.
    written = ("|", "<sub>") if page != "README.md" else ()
    assert [line for line in lines if len(line) > 100 and not line.startswith(written)] == []


def test_readme_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 200
    assert len(TEXT["README.md"].split()) <= 1_400


BLOCKS = [
    (page, block)
    for page, text in TEXT.items()
    for block in re.findall(r"(?<!-->\n)^```python\n(.*?)^```", text, re.M | re.S)
]


def test_the_python_of_the_pages_is_found():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("page, block", BLOCKS)
def test_the_python_of_a_page_compiles_and_imports_every_name_it_uses(page, block):
    used, made = set(), set(vars(builtins))
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            made.add(node.name)
        if isinstance(node, ast.arg):
            made.add(node.arg)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), node.module
    assert used <= made, used - made


def calls(path: Path):
    """(line, name of what is called, {keyword: constant}) of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            yield node.lineno, ast.unparse(node.func), keywords


def test_nothing_is_loaded_in_part_and_no_pickle_is_run():
    files = [
        path
        for path in ROOT.rglob("*.py")
        if not any(part.startswith((".", "venv", "runs")) for part in path.relative_to(ROOT).parts)
    ]
    found = [(path.name, *call) for path in files for call in calls(path)]
    assert {"containers.py", "native.py", "model.py", "conftest.py"} <= {p.name for p in files}
    assert any(name == "torch.load" for _, _, name, _ in found)
    partial = [
        (file, line)
        for file, line, name, keywords in found
        if name != "zip" and keywords.get("strict", True) is not True
    ]
    assert partial == []
    # A test may read back an optimizer that it wrote a line before.
    unsafe = [
        (file, line)
        for file, line, name, keywords in found
        if name == "torch.load" and keywords.get("weights_only") is not True
    ]
    assert [place for place in unsafe if place[0] != "test_adamw8bit.py"] == []
