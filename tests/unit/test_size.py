"""The limits of size that keep the code readable in an afternoon, and the constructs that it never uses."""

import ast
import functools
import pathlib
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("configs", "transport", "workers", "orchestrator", "recipes", "bench")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_RECIPE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_CLASS_DEPTH = 399, 149, 59, 7, 2

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def where(path: pathlib.Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def num_lines(path: pathlib.Path) -> int:
    return len(path.read_text().splitlines())


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: Function) -> list[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [one.arg for one in every if one is not None and one.arg not in ("self", "cls")]


def last_name(node: ast.expr) -> str:
    """`C` of `C`, `module.C` and `C[T]`; empty for anything else."""
    if isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def class_depths(trees: list[ast.Module]) -> dict[str, int]:
    """How many of our own classes each of ours inherits from, on its longest way up."""
    bases = {
        node.name: [last_name(base) for base in node.bases]
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }

    def depth(name: str) -> int:
        return max((1 + depth(base) for base in bases[name] if base in bases and base != name), default=0)

    return {name: depth(name) for name in bases}


def is_recipe(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "train" for node in tree.body)


def forbidden(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Everything in a module that runs what it reads, or hides what went wrong."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                imported = [name.name for name in names]
                yield from ((node, name) for name in imported if name.partition(".")[0] in UNSAFE_MODULES)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in UNSAFE_MODULES:
                yield node, module
            case ast.ImportFrom(module="yaml", names=names):
                yield from ((node, f"yaml.{name.name}") for name in names if name.name in UNSAFE_YAML)
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield node, name
            case ast.Attribute(value=ast.Name(id="builtins"), attr="eval" | "exec" as name):
                yield node, name
            case ast.Attribute(value=ast.Name(id="yaml"), attr=name) if name in UNSAFE_YAML:
                yield node, f"yaml.{name}"
            case ast.keyword(arg="weights_only" | "allow_pickle" as name, value=ast.Constant(value=value)):
                if value is not (name == "weights_only"):
                    yield node.value, f"{name}={value}"
            case ast.ExceptHandler(type=None):
                yield node, "bare except"
            case ast.ExceptHandler(type=caught) if catches_everything(caught) and not raises(node):
                yield node, "an except that takes everything and goes on"


UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "full_load", "Loader", "UnsafeLoader"}


def catches_everything(caught: ast.expr | None) -> bool:
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught] if caught else []
    return any(last_name(name) in ("Exception", "BaseException") for name in names)


def raises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) for statement in handler.body for node in ast.walk(statement))


def violations(check: Callable[[pathlib.Path], Iterator[str]]) -> list[str]:
    return [line for path in FILES for line in check(path)]


def test_there_are_files_to_look_at():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


def test_files_have_fewer_than_400_lines():
    assert [where(path, parse(path)) for path in FILES if num_lines(path) > MAX_FILE_LINES] == []


def test_recipes_have_fewer_than_150_lines():
    recipes = [path for path in FILES if path.parent.name == "recipes" and is_recipe(parse(path))]
    assert {path.stem for path in recipes} >= {"grpo", "sft"}
    assert {path.name: num_lines(path) for path in recipes if num_lines(path) > MAX_RECIPE_LINES} == {}


def test_functions_have_fewer_than_60_lines():
    def check(path: pathlib.Path) -> Iterator[str]:
        for function in functions(parse(path)):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{where(path, function)} {function.name}: {length} lines"

    assert violations(check) == []


def test_functions_have_fewer_than_8_parameters():
    def check(path: pathlib.Path) -> Iterator[str]:
        for function in functions(parse(path)):
            if len(parameters(function)) > MAX_PARAMETERS:
                yield f"{where(path, function)} {function.name}: {', '.join(parameters(function))}"

    assert violations(check) == []


def test_our_classes_are_fewer_than_3_deep():
    depths = class_depths([parse(path) for path in FILES])
    assert {name: depth for name, depth in depths.items() if depth > MAX_CLASS_DEPTH} == {}


def test_no_file_is_called_utils():
    assert [path for path in FILES if path.stem in ("utils", "util", "helpers") or path.stem.endswith("_v2")] == []


RUNS_USERS_CODE = {"reward_process.py"}
"""Where whatever a user's function raises is the answer that goes back to the run."""


def test_nothing_that_is_read_is_run_and_no_error_is_swallowed():
    def check(path: pathlib.Path) -> Iterator[str]:
        for node, what in forbidden(parse(path)):
            if not (path.name in RUNS_USERS_CODE and what == "an except that takes everything and goes on"):
                yield f"{where(path, node)} {what}"

    assert violations(check) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle"]),
        ("import yaml\nyaml.load(text)", ["yaml.load"]),
        ("from yaml import load", ["yaml.load"]),
        ("yaml.safe_load(text)", []),
        ("eval(text)", ["eval"]),
        ("exec(text)", ["exec"]),
        ("model.eval()", []),
        ("torch.load(path, weights_only=False)", ["weights_only=False"]),
        ("torch.load(path, weights_only=True)", []),
        ("numpy.load(path, allow_pickle=True)", ["allow_pickle=True"]),
        ("try:\n  f()\nexcept:\n  raise", ["bare except"]),
        ("try:\n  f()\nexcept Exception:\n  pass", ["an except that takes everything and goes on"]),
        ("try:\n  f()\nexcept (OSError, BaseException):\n  g()", ["an except that takes everything and goes on"]),
        ("try:\n  f()\nexcept Exception as error:\n  raise KeyError from error", []),
        ("try:\n  f()\nexcept OSError:\n  pass", []),
    ],
)
def test_forbidden_constructs_are_recognised(source: str, found: list[str]):
    assert [what for _, what in forbidden(ast.parse(source))] == found


def test_parameters_depth_and_recipes_are_counted_by_hand():
    source = "class A(Exception): ...\nclass B(m.A): ...\nclass C(B[T]): ...\ndef f(self, a, /, b, *c, d, **e): ..."
    tree = ast.parse(source)
    assert class_depths([tree]) == {"A": 0, "B": 1, "C": 2}
    assert parameters(next(functions(tree))) == ["a", "b", "d", "c", "e"]
    assert not is_recipe(tree)
    assert is_recipe(ast.parse("async def train(config, orchestrator): ..."))
