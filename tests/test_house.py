"""The house keeps its shape: who imports whom, how wide lines are, how large functions are.

    python tests/test_house.py [N]       # what is broken today, N places of each kind

Size is counted in code tokens, without comments: wide lines and missing blank lines buy nothing.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDTH = 100  # columns of a line
FUNCTION = 500  # code tokens of a function …
KERNEL = 800  # … of a Triton kernel
SCRIPT = 6_000  # … of a script at the root
PART = 4_500  # … of a file in a folder
KERNEL_FILE = 6_000  # … of a file in kernels/
SCRIPTS = {
    "model.py",
    "mmdit.py",
    "objectives.py",
    "samplers.py",
    "vae.py",
    "text.py",
    "train.py",
    "distill.py",
    "eval_fid.py",
}
# What is at the root beside the scripts and what starts with a dot.
BESIDE = {"README.md", "LICENSE", "requirements.txt", "requirements-dev.txt"}
# From the ground up. A file imports from floors strictly below its own, or from its own folder:
# never upwards, never inside a function, never for a type only.
FLOORS = [
    {"kernels", "harness", "diffusion"},
    {"model", "objectives"},
    {"mmdit"},
    {"ckpt"},
    {"vae"},
    {"text"},
    {"data"},
    {"samplers", "metrics", "distillation"},
    {"eval_fid", "training"},
    {"train"},
    {"distill"},
    {"experiments", "benchmarks"},
    {"tests"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
# Commands that live in a folder but stand on a higher floor: nothing imports them.
COMMANDS = {"kernels/selfcheck.py": "benchmarks"}
# What explains how one model is trained.
READ = ("objectives.py", "model.py", "train.py")
READ_LINES = 1_500
READ_TOKENS = 13_000
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def files() -> list[Path]:
    """Every Python file of the project."""

    def ours(path: Path) -> bool:
        parts = path.relative_to(ROOT).parts
        return not any(part.startswith((".", "runs", "venv")) for part in parts)

    return [path for path in sorted(ROOT.rglob("*.py")) if ours(path)]


def place(path: Path) -> str:
    """Where a file lives: train.py -> "train", data/tags.py -> "data"."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def is_ours(module: str) -> bool:
    head = module.split(".")[0]
    return (ROOT / f"{head}.py").exists() or (ROOT / head).is_dir()


def imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, module, hidden) of every import of this project's own modules.

    Hidden: inside a function, or under `if TYPE_CHECKING`.
    """
    found = []

    def walk(node: ast.AST, hidden: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((child.lineno, alias.name, hidden) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level:
                found.append((child.lineno, child.module, hidden))
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            walk(child, hidden or function or typing)

    walk(ast.parse(path.read_text()), False)
    return [(line, module, hidden) for line, module, hidden in found if is_ours(module)]


def code_tokens(path: Path) -> list[tokenize.TokenInfo]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [token for token in tokens if token.type not in NO_CODE]


def is_measured(path: Path) -> bool:
    return place(path) not in ("tests", "benchmarks")


def wide_lines() -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number} {len(line)}"
        for path in files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > WIDTH
    ]


def long_functions() -> list[str]:
    found = []
    for path in filter(is_measured, files()):
        lines = [token.start[0] for token in code_tokens(path)]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            size = sum(node.lineno <= line <= node.end_lineno for line in lines)
            kernel = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            if size > (KERNEL if kernel else FUNCTION):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {size}")
    return found


def large_files() -> list[str]:
    found = []
    for path in filter(is_measured, files()):
        most = PART
        if path.parent == ROOT:
            most = SCRIPT
        elif place(path) == "kernels":
            most = KERNEL_FILE
        size = len(code_tokens(path))
        if size > most:
            found.append(f"{path.relative_to(ROOT)} {size} > {most}")
    return found


def strange_at_the_root() -> list[str]:
    names = {path.name for path in ROOT.iterdir() if path.is_file()}
    known = SCRIPTS | BESIDE
    return sorted(n for n in names - known if not n.startswith(".")) + sorted(known - names)


def hidden_imports() -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} {module}"
        for path in files()
        if place(path) != "tests"
        for line, module, hidden in imports(path)
        if hidden
    ]


def imports_upwards() -> list[str]:
    found = []
    for path in files():
        mine = place(path)
        for line, module, _ in imports(path):
            theirs = module.split(".")[0]
            floor = FLOOR.get(COMMANDS.get(str(path.relative_to(ROOT)), mine), 99)
            if mine != theirs and floor <= FLOOR.get(theirs, -1):
                found.append(f"{path.relative_to(ROOT)}:{line} {theirs}")
    return found


def circles() -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    graph = {}
    for path in files():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {module for _, module, _ in imports(path)}

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for module in graph.get(todo.pop(), set()) & graph.keys():
                if module not in seen:
                    seen.add(module)
                    todo.append(module)
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def reading_path() -> list[str]:
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in READ)
    tokens = sum(len(code_tokens(ROOT / name)) for name in READ)
    if lines <= READ_LINES and tokens <= READ_TOKENS:
        return []
    return [f"{', '.join(READ)}: {lines} lines, {tokens} tokens"]


def errors_without_advice() -> list[str]:
    """Every UserError of the product says what to do: do="…", a sentence."""
    found = []
    for path in filter(is_measured, files()):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "UserError":
                continue
            advice = [keyword.value for keyword in node.keywords if keyword.arg == "do"]
            if not advice or ast.unparse(advice[0]) in ("''", '""'):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


# What could run code out of a file, a name or a string.
DANGEROUS = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "torch.jit.load", "marshal.loads", "yaml.load", "yaml.unsafe_load", "joblib.load",
}  # fmt: skip
DANGEROUS_FLAGS = {("allow_pickle", "True"), ("shell", "True"), ("weights_only", "False")}


def dangerous_calls() -> list[str]:
    """No loader may run anything: no call of DANGEROUS, no keyword of DANGEROUS_FLAGS."""
    found = []
    for path in files():
        if place(path) == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            flags = {(word.arg, ast.unparse(word.value)) for word in node.keywords}
            if ast.unparse(node.func) in DANGEROUS or flags & DANGEROUS_FLAGS:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)}")
    return found


CHECKS = (
    wide_lines,
    long_functions,
    large_files,
    strange_at_the_root,
    hidden_imports,
    imports_upwards,
    circles,
    reading_path,
    errors_without_advice,
    dangerous_calls,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house(check):
    assert check() == []


if __name__ == "__main__":
    most = int(sys.argv[-1]) if sys.argv[-1].isdigit() else 6
    for check in CHECKS:
        found = check()
        print(f"{check.__name__}: {len(found)}", *(f"\n    {place}" for place in found[:most]))
