"""Nothing is offered that nothing reads: every option is an attribute that the package looks up.

`x.images` counts for the options of the class that `x` is annotated, assigned or passed as, so that
options of one name in two sections do not stand in for each other.
"""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import types
import typing

import pytest

import vapi_jax
from vapi_jax.methods import METHODS
from vapi_jax.methods.config import TrainConfig
from vapi_jax.models.conditions import CONDITIONS
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.rewards import REWARDS, RewardSpec

PACKAGE = pathlib.Path(vapi_jax.__file__).parent

# Where a check of an option's value is no use of it.
CHECKS = {"vapi_jax.methods.config", "vapi_jax.methods.resolve"}

# Read by name: the module, and the text that reads them.
READ_BY_NAME = {
    ("DataConfig", "train_split"): ("data/config.py", '_split")'),
    ("DataConfig", "val_split"): ("data/config.py", '_split")'),
    ("DataConfig", "test_split"): ("data/config.py", '_split")'),
}


class Reads(ast.NodeVisitor):
    """Collects (class, attribute) of a module's attributes whose owner's class can be told."""

    def __init__(self, module):
        self.module = module
        self.found = set()
        self.assigned = {}  # (class, attribute) -> class, of "self.x = y"
        self.scopes = [{}]

    def infer(self, node):
        """The class of an expression's value, or None."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in self.scopes[::-1] if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            owner = self.infer(node.value)
            return None if owner is None else self.attribute(owner, node.attr)
        if isinstance(node, ast.IfExp | ast.BoolOp):
            parts = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
            return next(filter(None, map(self.infer, parts)), None)
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) == "dataclasses.replace":
                return self.infer(node.args[0])
            called = vars(self.module).get(getattr(node.func, "id", None))
            if isinstance(called, type):
                return called
            return evaluate(getattr(called, "__annotations__", {}).get("return"), self.module)
        return None

    def attribute(self, owner, name):
        for kind in owner.__mro__:
            if (kind, name) in self.assigned:
                return self.assigned[kind, name]
            own = vars(kind).get(name)
            if isinstance(own, property) or hasattr(own, "func"):  # func: functools.cached_property
                function = own.fget if isinstance(own, property) else own.func
                return evaluate(function.__annotations__.get("return"), home(kind))
            annotations = inspect.get_annotations(kind)
            if name in annotations:
                return evaluate(annotations[name], home(kind))
        return None

    def visit_ClassDef(self, node):
        self.scopes.append({"self": vars(self.module).get(node.name)})
        for child in node.body:
            if getattr(child, "name", "") != "__post_init__":  # a check, and no use
                self.visit(child)
        self.scopes.pop()

    def visit_FunctionDef(self, node):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        annotated = {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation}
        self.scopes.append({name: evaluate(a, self.module) for name, a in annotated.items()})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node):
        self.visit(node.value)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
            for name, value in pairs:
                kind = self.infer(value)
                if isinstance(name, ast.Name):
                    self.scopes[-1][name.id] = kind
                elif isinstance(name, ast.Attribute) and kind is not None:
                    self.assigned[self.infer(name.value), name.attr] = kind

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            self.scopes[-1][node.target.id] = evaluate(annotation, self.module)

    def visit_Attribute(self, node):
        owner = self.infer(node.value)
        if owner is not None and isinstance(node.ctx, ast.Load):
            self.found |= {(kind, node.attr) for kind in owner.__mro__}
        self.generic_visit(node)


def evaluate(annotation, module):
    """The class that an annotation means, without "| None"; None where it is no one class."""
    try:
        kind = eval(annotation, vars(module)) if isinstance(annotation, str) else annotation
    except Exception:  # a name for the type checker only
        return None
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    return kind if isinstance(kind, type) else None


def home(kind):
    return importlib.import_module(kind.__module__)


def reads():
    found = set()
    for info in pkgutil.walk_packages([str(PACKAGE)], "vapi_jax."):
        if info.name not in CHECKS and not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            visitor = Reads(module)
            visitor.visit(ast.parse(pathlib.Path(module.__file__).read_text(encoding="utf-8")))
            found |= visitor.found
    return found


def options(kind, found):
    found.add(kind)
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint) and hint not in found:
            options(hint, found)
    return found


def all_options():
    found = {LlamaConfig, JanusConfig, RewardSpec, *REWARDS.values(), *CONDITIONS.values()}
    for kind in (TrainConfig, *(method.Options for method in METHODS.values())):
        options(kind, found)
    return found


@pytest.fixture(scope="module")
def unread():
    read, kinds = reads(), all_options()
    return {
        (kind.__name__, field.name)
        for kind in kinds
        for field in dataclasses.fields(kind)
        if "given" not in field.metadata
        # An option that a class inherits may be read of the class that it is from.
        and not any((base, field.name) in read for base in kind.__mro__)
    }


def test_the_options_are_those_of_all_sections():
    names = {kind.__name__ for kind in all_options()}
    assert names >= {
        "TrainConfig", "VAPiOptions", "NextTokenOptions", "LPIPS", "DataConfig", "VQConfig", "LlamaConfig",
        "JanusConfig", "LossWeights", "TokenizerOptions", "Label", "OptimizerConfig", "MeshConfig",
        "EvalConfig", "InitConfig", "CheckpointConfig",
    }  # fmt: skip


def test_every_option_is_read_by_something(unread):
    assert unread - READ_BY_NAME.keys() == set()


@pytest.mark.parametrize("option", READ_BY_NAME, ids=".".join)
def test_an_option_that_is_read_by_name_is_read_where_it_is_said_to_be(option, unread):
    path, text = READ_BY_NAME[option]
    assert option in unread, "it is read as an attribute now: take it off the list"
    assert text in (PACKAGE / path).read_text(encoding="utf-8")


PROGRAM = """
import dataclasses

@dataclasses.dataclass
class Eval:
    images: int = 1
    every: int = 1
    never: int = 1

    def __post_init__(self):
        assert self.never > 0

@dataclasses.dataclass
class Other:
    every: int = 1
    images: int = 1
    eval: Eval = Eval

    @property
    def judged(self) -> Eval:
        return self.eval

def use(other: Other | None, unknown):
    {use}
"""


@pytest.mark.parametrize(
    ("use", "found"),
    [
        ("other.images", {("Other", "images")}),
        ("other.eval.images", {("Other", "eval"), ("Eval", "images")}),
        ("e = other.eval; e.every", {("Other", "eval"), ("Eval", "every")}),
        ("a, e = 1, other.eval; e.every", {("Other", "eval"), ("Eval", "every")}),
        ("other.judged.every", {("Other", "judged"), ("Eval", "every")}),
        ("dataclasses.replace(other, every=2).images", {("Other", "images")}),
        ("(lambda: other.every)()", {("Other", "every")}),
        ("unknown.images", set()),
        ("other.images = 3", set()),
        ("other = unknown; other.images", set()),
    ],
)
def test_the_audit_tells_whose_attribute_is_read(use, found):
    module = types.ModuleType("audited")
    source = PROGRAM.replace("{use}", use)
    module.__dict__["__name__"] = __name__
    exec(source, vars(module))
    visitor = Reads(module)
    visitor.visit(ast.parse(source))
    own = {(kind.__name__, name) for kind, name in visitor.found if kind is not object}
    assert own - {("Other", "eval")} == found - {("Other", "eval")}
