"""The house's rules, read from the source: who may import whom, what no file may call, and that importing does nothing."""
from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("models", "utils", "benchmarks", "docs")
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
FILES = sorted([*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))])

# Rooms of utils/, from the top of the house down: each may import those after it. "utils" is the ground floor, the files that lie in utils/ itself.
FLOORS = ("utils.training", "utils.compare", "utils.compress", "utils.deploy", "utils.plots", "utils.evaluate", "utils.measure", "utils.export",
          "utils.data", "utils")
# Rooms beside each other, which do not know one another.
STRANGERS = {("utils.training", "utils.deploy"), ("utils.training", "utils.compare"), ("utils.compare", "utils.deploy"),
             ("utils.compare", "utils.compress"), ("utils.compress", "utils.deploy")}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(node: ast.AST) -> list[str]:
    """The own modules that an import statement names: `from utils.data import labels` names utils.data.labels."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}"
        names = [f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module or "" for alias in node.names]
    else:
        names = []
    return [name for name in dict.fromkeys(names) if name in MODULES]


def graph() -> dict[str, set[str]]:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    return {name: {target for node in ast.walk(tree) for target in imported(node)} for name, tree in trees.items()}


def floor(name: str) -> str:
    return next(room for room in FLOORS if name == room or name.startswith(f"{room}."))


def may_import(name: str, target: str) -> bool:
    room, of = name.partition(".")[0], target.partition(".")[0]
    if name in SCRIPTS or room in ("benchmarks", "docs"):
        return target not in SCRIPTS and of != "docs"
    if room == "models":
        return of in ("models", "utils")
    if of != "utils":
        return False
    above, below = floor(name), floor(target)
    return FLOORS.index(above) <= FLOORS.index(below) and (above, below) not in STRANGERS


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of a cycle, or nothing: leaves are taken away until none is left."""
    rest = {name: set(targets) for name, targets in edges.items()}
    while leaves := [name for name, targets in rest.items() if not targets & rest.keys()]:
        for name in leaves:
            del rest[name]
    return sorted(rest)


def test_the_search_for_cycles_finds_them():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_imports_point_downward():
    wrong = [f"{name} -> {target}" for name, targets in graph().items() for target in sorted(targets) if not may_import(name, target)]
    assert wrong == []


def test_no_import_cycle():
    edges = graph()
    for name in edges:  # importing a.b runs a first
        edges[name] |= {parent for target in edges[name] for parent in (target.rpartition(".")[0],) if parent in MODULES and parent != name}
    edges = {name: {t for t in targets if t != name and not name.startswith(f"{t}.")} for name, targets in edges.items()}
    assert cycle(edges) == []


LATE = {"models.detector": {"models.weights"}}  # PyTorch, which files of small runtimes do without


def test_own_modules_are_imported_inside_functions_only_by_the_scripts_main():
    wrong = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            is_main = name in SCRIPTS and getattr(function, "name", "") == "main"
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not is_main:
                wrong += [f"{name}:{node.lineno}" for node in ast.walk(function) if set(imported(node)) - LATE.get(name, set())]
    assert wrong == []


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load",
             "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "dill.loads", "yaml.unsafe_load", "yaml.full_load"}


def forbidden_calls(source: str) -> list[str]:
    """Calls that would run what a file contains."""
    found = []
    for name, call in calls(ast.parse(source)):
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name in FORBIDDEN or options.get("shell") == "True" or options.get("allow_pickle") == "True":
            found.append(f"{call.lineno}: {name}")
        if name in ("torch.load", "load") and options.get("weights_only") != "True":
            found.append(f"{call.lineno}: {name} without weights_only=True")
        if name == "yaml.load" and not (len(call.args) == 2 and ast.unparse(call.args[1]) in ("_Loader", "yaml.SafeLoader")):
            found.append(f"{call.lineno}: {name} with another loader than SafeLoader's child")
    return found


@pytest.mark.parametrize("source", [
    "eval('1')", "exec('1')", "os.system('ls')", "pickle.load(f)", "pickle.loads(b)", "torch.load(f)", "torch.load(f, weights_only=False)",
    "yaml.load(f, yaml.Loader)", "subprocess.run('ls', shell=True)", "np.load(f, allow_pickle=True)", "def f():\n    return eval(x)",
])  # fmt: skip
def test_the_search_for_forbidden_calls_finds_them(source):
    assert len(forbidden_calls(source)) == 1


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(f, weights_only=True)", "yaml.safe_load(f)", "re.compile('a')", "literal_eval('1')"])
def test_the_search_for_forbidden_calls_finds_nothing_else(source):
    assert forbidden_calls(source) == []


@pytest.mark.parametrize("name", MODULES)
def test_nothing_a_file_contains_is_run(name):
    source = MODULES[name].read_text(encoding="utf-8")
    assert forbidden_calls(source) == []
    names = {alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    assert not names & {"loads", "Unpickler"} and "marshal" not in names


STATE = """
import json, os, random, sys, warnings
import numpy, torch
def state():
    return [dict(os.environ), list(sys.path), os.getcwd(), str(torch.get_default_dtype()), str(torch.get_default_device()), torch.get_num_threads(),
            torch.get_num_interop_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.get_float32_matmul_precision(),
            repr(random.getstate()), repr(numpy.random.get_state()), repr(numpy.geterr()), sys.getrecursionlimit(),
            repr(sys.excepthook), [repr(f) for f in warnings.filters if 'light_yolo' in repr(f)]]
for outside in {outside!r}:
    try:
        __import__(outside)
    except ImportError:
        pass
before = state()
import importlib
changed = []
for name in {names!r}:
    importlib.import_module(name)
    after = state()
    if after != before:
        changed.append((name, [i for i, (a, b) in enumerate(zip(before, after)) if a != b]))
        before = after
print(json.dumps(changed))
"""


def outside_modules() -> list[str]:
    """What the house imports from elsewhere: imported first, as what those packages do to the process is not ours."""
    names = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    return sorted(name for name in names if name.partition(".")[0] not in {"models", "utils", "benchmarks", *SCRIPTS, "__future__"})


def test_importing_does_nothing(tmp_path):
    """Neither the environment nor any process-wide setting changes, and nothing is written or said."""
    names = [name for name in MODULES if name.partition(".")[0] != "docs"]
    code = STATE.format(outside=outside_modules(), names=names)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(tmp_path / "mpl")}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == []
    assert [p.name for p in tmp_path.iterdir() if p.name != "mpl"] == []


def test_no_path_of_a_machine():
    for path in [*MODULES.values(), *(ROOT / "tests").glob("*.py"), *ROOT.rglob("*.yaml"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text(encoding="utf-8")
        assert not any(f"/{word}/" in text for word in ("work", "root", "home/ubuntu")), path
