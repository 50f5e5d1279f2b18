"""The order of the layers (architecture section 3): who may import whom, and what stays unimported."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "genray"
LAYERS = [
    {"types", "errors", "console", "tables"},
    {"storage"},
    {"config"},
    {"records"},
    {"core"},
    {"parallel"},
    {"models", "data", "attacks", "objectives"},
    {"interop"},
    {"run", "learners"},
    {"evaluation"},
    {"runtime"},
    {"recording"},
    {"tuning", "training"},
    {"reporting"},
    {"api"},
    {"cli"},
    {"train", "evaluate", "tune", "report", "export", "label"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# An objective names its attack; the reverse is a circle.
SIBLINGS = {("objectives", "attacks"), ("run", "learners"), ("learners", "run"), ("evaluation", "recording")}
USES_RAY = {"runtime", "tuning"}
COMMANDS = {"train", "evaluate", "tune", "report", "export", "label"}  # run, not imported


def modules():
    """Dotted name -> file of every module of the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


MODULES = dict(modules())


def imports(name, *, top_level_only=False):
    """Full dotted names a module imports, functions and classes included unless `top_level_only`."""
    file = MODULES[name]
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in at_import_time(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{target}.{alias.name}" for alias in node.names)


def at_import_time(tree):
    """All nodes that run when the module is imported: everything outside function bodies."""
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_import_time(child)


def layer(name):
    """First part below `genray`; empty for the package itself and for what is not ours."""
    parts = name.split(".")
    if parts[-1] == "__main__":
        return "__main__"
    return parts[1] if parts[0] == "genray" and len(parts) > 1 else ""


def test_every_module_has_a_layer():
    unknown = {layer(name) for name in MODULES} - set(LEVEL) - {""}
    assert unknown == set(), "put it in LAYERS, and in the architecture"
    assert {"config", "core", "learners", "runtime", "recording"} <= {layer(name) for name in MODULES}


def edges():
    for name in MODULES:
        for target in imports(name):
            mine, theirs = layer(name), layer(target)
            if mine and theirs in LEVEL and mine != theirs:
                yield name, mine, theirs


def test_layers_import_only_from_those_before_them():
    found = list(edges())
    assert {("core", "types"), ("learners", "core"), ("recording", "evaluation")} <= {(a, b) for _, a, b in found}
    wrong = {
        f"{name} imports {theirs}"
        for name, mine, theirs in found
        if LEVEL[theirs] >= LEVEL[mine] and (mine, theirs) not in SIBLINGS
    }
    assert wrong == set()


def roots(name, **options):
    return {target.split(".")[0] for target in imports(name, **options)}


def test_core_takes_plain_values_not_configuration():
    for name in MODULES:
        if layer(name) == "core":
            assert not [t for t in imports(name) if layer(t) == "config"], name


def test_only_runtime_and_tuning_import_ray_at_module_level():
    users = {layer(name) for name in MODULES if "ray" in roots(name, top_level_only=True)}
    assert "runtime" in users and users <= USES_RAY


def test_nothing_imports_what_is_not_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (lines for name, lines in project["optional-dependencies"].items() if name != "test")
    declared = sum(extras, project["dependencies"])
    names = {re.match(r"[A-Za-z0-9_-]+", line).group() for line in declared}
    known = {IMPORT_NAMES.get(name, name) for name in names} | {"genray", "pydantic_core"} | sys.stdlib_module_names
    foreign = {(root, name) for name in MODULES for root in roots(name) if root not in known}
    assert "torch" in known and foreign == set()


IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}


def loaded_after(code):
    """Names in `sys.modules` of a fresh interpreter that ran `code`."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys, json\nprint(json.dumps(sorted(m for m in sys.modules if sys.modules[m])))",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_genray_starts_nothing_heavy():
    loaded = loaded_after("import genray; genray.__version__")
    assert "genray" in loaded and not loaded & {"torch", "ray", "numpy", "yaml", "torchvision", "genray.cli"}


def test_configuration_is_read_without_torch():
    loaded = loaded_after("import genray.config; genray.config.load_config()")
    assert "genray.config.load" in loaded and not loaded & {"torch", "ray", "torchvision"}


@pytest.mark.slow
def test_everything_else_imports_no_ray():
    """Where it is not installed: test_without_ray.py."""
    names = [name for name in MODULES if layer(name) not in USES_RAY | COMMANDS and not name.endswith("__main__")]
    loaded = loaded_after(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert set(names) <= loaded and "torch" in loaded
    assert not {name for name in loaded if name.split(".")[0] == "ray"}


def test_every_wait_for_ray_has_a_limit():
    waits = 0
    for path in sorted((ROOT / "genray").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("ray.get", "ray.wait"):
                waits += 1
                assert "timeout" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
    assert waits >= 8
