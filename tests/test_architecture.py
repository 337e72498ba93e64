"""What the source promises as a whole, read with `ast`: which way imports point, and habits that never appear."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import openo3_jax
from openo3_jax import config

PACKAGE = Path(openo3_jax.__file__).parent
SOURCES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# Each layer may import the ones above it, never itself across a `|`, never one below.
VOCABULARY = {
    "errors",
    "types",
    "tasks",
    "tags",
    "geometry",
    "mesh",
    "hosts",
    "config",
    "config_json",
    "recipes",
    "model_files",
}
SIBLINGS = {"data", "models", "rewards"}
LAYERS = [
    VOCABULARY,
    SIBLINGS,
    {"policy", "tiny"},
    {"train"},
    {"plan"},
    {"evals"},
    {"report"},
    {"api"},
    {"experiments", "demo"},
    {"verbs"},
    {"cli", "__init__"},
]


def part(name: str) -> str:
    """`data/video` -> `data`, `mesh` -> `mesh`."""
    return name.partition("/")[0]


def layer(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part(name) in layer)


def allowed(importer: str, imported: str) -> bool:
    """May a file of one part import another part of the package?"""
    if importer in SIBLINGS | VOCABULARY and importer != imported and imported in SIBLINGS:
        return False
    return layer(imported) <= layer(importer)


def imports(tree: ast.AST) -> Iterator[str]:
    """Parts of the package that a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "openo3_jax" else node.module for alias in node.names
            ]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("openo3_jax."))


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_one_way(name):
    used = set(imports(ast.parse(SOURCES[name].read_text())))
    assert not [other for other in used if not allowed(part(name), other)]


@pytest.mark.parametrize(
    ("importer", "imported", "verdict"),
    [
        ("data", "types", True),
        ("data", "data", True),
        ("data", "models", False),
        ("models", "rewards", False),
        ("types", "data", False),
        ("config", "errors", True),
        ("train", "policy", True),
        ("policy", "train", False),
        ("train", "evals", False),
        ("verbs", "demo", True),
        ("verbs", "cli", False),
    ],
)
def test_the_rule_itself(importer, imported, verdict):
    assert allowed(importer, imported) is verdict


def test_the_rule_sees_every_form_of_import():
    source = (
        "import openo3_jax.data.video\nfrom openo3_jax import mesh as m\ndef f():\n from openo3_jax.train import loop"
    )
    assert list(imports(ast.parse(source))) == ["data", "mesh", "train"]


# ---- habits ----

FORBIDDEN_CALLS = {"eval", "exec", "print"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_OPTIONS = {"trust_remote_code", "allow_pickle"}
BROAD = {"Exception", "BaseException"}


def habits(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            yield f"{node.func.id}() in line {node.lineno}"
        if isinstance(node, ast.ExceptHandler) and is_broad(node):
            yield f"broad except in line {node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from (f"{m} in line {node.lineno}" for m in modules if m.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_OPTIONS and not is_false(node.value):
            yield f"{node.arg} in line {node.lineno}"
        if isinstance(node, ast.Global):
            yield f"global in line {node.lineno}"


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def is_broad(handler: ast.ExceptHandler) -> bool:
    """Swallows everything: no type, or a broad one that is not raised again."""
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {node.id for node in types if isinstance(node, ast.Name)}
    return handler.type is None or (bool(names & BROAD) and not isinstance(handler.body[-1], ast.Raise))


@pytest.mark.parametrize("name", SOURCES)
def test_habits(name):
    found = list(habits(ast.parse(SOURCES[name].read_text())))
    if part(name) in ("cli", "verbs"):  # stdout carries the result
        found = [habit for habit in found if not habit.startswith("print()")]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "eval('1')",
        "import pickle",
        "from pickle import loads",
        "load(x, trust_remote_code=True)",
        "try: f()\nexcept: pass",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept (ValueError, BaseException): pass",
        "def f():\n global x\n x = 1",
    ],
)
def test_the_search_finds_each_habit(source):
    assert len(list(habits(ast.parse(source)))) == 1


def test_cleaning_up_before_raising_again_is_no_broad_except():
    assert not list(habits(ast.parse("try: f()\nexcept BaseException:\n stop()\n raise")))


# ---- configuration ----

CONFIGS = [value for value in vars(config).values() if dataclasses.is_dataclass(value) and isinstance(value, type)]


def attributes_read() -> set[str]:
    """Names read as attributes anywhere but in config."""
    trees = [ast.parse(path.read_text()) for name, path in SOURCES.items() if part(name) != "config"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def test_every_config_field_has_a_reader():
    read = attributes_read()
    # A property of the class may stand between the field and its reader.
    derived = {
        node.attr
        for name, path in SOURCES.items()
        if part(name) == "config"
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name in read
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
    }
    unread = [f"{c.__name__}.{f.name}" for c in CONFIGS for f in dataclasses.fields(c) if f.name not in read | derived]
    assert len(CONFIGS) >= 6
    assert not unread
