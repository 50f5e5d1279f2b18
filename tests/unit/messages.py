"""Every error message that the source can give, as a text with … where something is filled in."""

import ast
import re

from conftest import ROOT

import genray.errors

ERRORS = {name for name, kind in vars(genray.errors).items() if isinstance(kind, type)}
_KINDS = re.compile(r"^class (\w+)\((?:" + "|".join(ERRORS) + r")\):", re.M)
# Findings of an evaluation and warnings of the end of a run, collected in lists of the same name.
NOT_SHOWN = re.compile("points outside .*|not done within .*|….: …")


def template(node):
    """The text that an expression makes; None where it is not a text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or "…") + (template(node.right) or "…")
    if isinstance(node, (ast.IfExp, ast.ListComp)):
        return template(node.body if isinstance(node, ast.IfExp) else node.elt)
    return None


def _given(node, functions, constants, all_errors):
    """(error, expression) of each message that a piece of the source gives."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in all_errors:
        for arg in node.args:
            yield node.func.id, constants.get(getattr(arg, "id", None), arg)
            if isinstance(arg, ast.Call) and getattr(arg.func, "id", "") in functions:  # a function that words it
                yield from ((node.func.id, text) for text in _returned(functions[arg.func.id]))
            inner = arg.values if isinstance(arg, ast.JoinedStr) else ()
            for part in (p.value for p in inner if isinstance(p, ast.FormattedValue)):
                if isinstance(part, ast.Call) and getattr(part.func, "id", "") in functions:
                    yield from ((node.func.id, text) for text in _returned(functions[part.func.id]))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        owner = getattr(node.func.value, "id", getattr(node.func.value, "attr", ""))
        if (node.func.attr, owner) in (("error", "parser"), ("append", "problems")):
            yield "ConfigError", node.args[0]
    if isinstance(node, ast.AugAssign) and getattr(node.target, "id", "") == "problems":
        yield "ConfigError", node.value
    if isinstance(node, ast.FunctionDef) and "problems" in node.name:
        yield from (("ConfigError", inner.value) for inner in ast.walk(node) if isinstance(inner, ast.Yield))
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return) and isinstance(inner.value, ast.List):
                yield from (("ConfigError", text) for text in inner.value.elts)


def _returned(function):
    return [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]


def messages():
    """{template: {"error", "where"}} of every message in the source that has words of its own."""
    found, files = {}, {file: file.read_text(encoding="utf-8") for file in sorted((ROOT / "genray").rglob("*.py"))}
    all_errors = ERRORS.union(*(_KINDS.findall(text) for text in files.values()))
    for file, source in files.items():
        tree = ast.parse(source)
        constants = {getattr(n.targets[0], "id", ""): n.value for n in tree.body if isinstance(n, ast.Assign)}
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            for error, expression in _given(node, functions, constants, all_errors):
                text = template(expression)
                if text is not None and re.search(r"[a-z]{3}", text) and not NOT_SHOWN.fullmatch(text):
                    found[text] = {"error": error, "where": f"{file.relative_to(ROOT)}:{expression.lineno}"}
    return found
