"""What is installed is what is imported: dependencies, constraints and the wheel's data files."""

import ast
import importlib.metadata
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import vapi_jax
from tests.helpers import commands
from tests.helpers.paths import ROOT

# Where the name to import is not the name to install (both in canonical form).
DISTRIBUTIONS = {
    "absl": "absl-py",
    "bs4": "beautifulsoup4",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "pil": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# Imported by name at the place of use, where a helpful error says which extra to install.
OPTIONAL = {
    "tfds": {"tensorflow-datasets"},
    "text": {"beautifulsoup4", "ftfy", "pyarrow", "sentencepiece", "tokenizers"},
}
# Of the test extra: run, not imported.
TOOLS = {"ruff", "import-linter", "mypy", "pytest-xdist", "setuptools"}


def read_requirements(lines) -> dict[str, Requirement]:
    """Canonical name -> requirement, of the lines of a requirements file."""
    found = {}
    for line in lines:
        text = line.split("#")[0].strip()
        if text:
            requirement = Requirement(text)
            found[canonicalize_name(requirement.name)] = requirement
    return found


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def base(project) -> dict[str, Requirement]:
    return read_requirements(project["dependencies"])


@pytest.fixture(scope="module")
def extras(project) -> dict[str, dict[str, Requirement]]:
    return {k: read_requirements(v) for k, v in project["optional-dependencies"].items()}


@pytest.fixture(scope="module")
def requirements() -> dict[str, Requirement]:
    return read_requirements((ROOT / "requirements.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def constraints() -> dict[str, Requirement]:
    return read_requirements((ROOT / "constraints.txt").read_text().splitlines())


def imported_distributions(*folders: str) -> dict[str, str]:
    """Canonical distribution name -> one file that imports it, for all third-party imports."""
    found = {}
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in modules:
                top = module.split(".")[0]
                if top in sys.stdlib_module_names or top in ("vapi_jax", "configs", "tests"):
                    continue
                name = canonicalize_name(top)
                found[DISTRIBUTIONS.get(name, name)] = str(path.relative_to(ROOT))
    return found


def test_every_import_is_declared(base, extras):
    optional = {name for extra, names in OPTIONAL.items() for name in names & extras[extra].keys()}
    imported = imported_distributions("vapi_jax", "configs", "launch")
    undeclared = {k: v for k, v in imported.items() if k not in base.keys() | optional}
    assert len(imported) > 10
    assert not undeclared


def test_every_import_of_the_tests_is_declared(base, extras):
    imported = imported_distributions("tests")
    # packaging comes with pytest, jaxlib with jax.
    brought = {"packaging", "jaxlib"}
    allowed = (
        base.keys()
        | extras["test"].keys()
        | extras["tfds"].keys()
        | extras["text"].keys()
        | brought
    )
    assert not {k: v for k, v in imported.items() if k not in allowed}


def test_the_test_extra_is_used(extras):
    assert extras["test"].keys() - TOOLS <= imported_distributions("tests").keys()


def test_base_needs_no_accelerator_and_no_tensorflow(base):
    assert not any(requirement.extras for requirement in base.values())
    assert not [name for name in base if "tensorflow" in name or "cuda" in name or name == "torch"]


def test_requirements_are_the_base_for_cuda_with_datasets(base, extras, requirements):
    optional = extras["tfds"] | extras["text"]
    assert requirements.keys() == base.keys() | optional.keys()
    assert requirements["jax"].extras == extras["cuda12"]["jax"].extras == {"cuda12"}
    for name, requirement in requirements.items():
        declared = base.get(name) or optional[name]
        assert requirement.specifier == declared.specifier, name


def test_constraints_pin_what_is_declared(base, extras, constraints):
    for name, declared in (base | extras["test"] | extras["tfds"] | extras["text"]).items():
        assert name in constraints, f"constraints.txt has no {name}"
        (pin,) = constraints[name].specifier
        assert pin.operator == "=="
        assert declared.specifier.contains(pin.version, prereleases=True), name


def test_constraints_cover_what_those_bring(base, extras, constraints):
    missing, waiting, seen = [], [*base, *extras["test"], *extras["text"]], set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        if name not in constraints:
            missing.append(name)
        if name == "torch":  # what it brings is its wheel's choice: much for CUDA, little for CPUs
            continue
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    assert len(seen) > 40
    assert not missing


def test_newer_constraints_are_later_versions_of_what_is_declared(base, constraints):
    newer = read_requirements((ROOT / "constraints-newer.txt").read_text().splitlines())
    assert {"jax", "jaxlib"} <= newer.keys()
    for name, requirement in newer.items():
        (pin,), (usual,) = requirement.specifier, constraints[name].specifier
        assert pin.operator == "==" and Version(pin.version) > Version(usual.version), name
        assert name not in base or base[name].specifier.contains(pin.version), name


def test_no_package_index_is_named():
    for name in ("requirements.txt", "constraints.txt", "constraints-newer.txt", "pyproject.toml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"^\s*(-i|-f|--\S*index|--find-links)|://", text, re.MULTILINE), name


def test_version_and_python(project):
    assert project["dynamic"] == ["version"]
    assert Version(vapi_jax.__version__).release
    assert project["requires-python"] == ">=3.11"


def test_data_files_are_packaged():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    package = ROOT / "vapi_jax"
    packaged = {
        p for pattern in setuptools["package-data"]["vapi_jax"] for p in package.glob(pattern)
    }
    others = {
        path
        for path in package.rglob("*")
        if path.is_file()
        and path.suffix not in (".py", ".pyc")
        and not any(part.endswith("_cache") for part in path.relative_to(package).parts)
    }
    assert package / "py.typed" in packaged
    assert others <= packaged
    # Every folder of modules is a package; without __init__.py a wheel would leave it out.
    assert {p.parent for p in package.rglob("*.py")} == {
        p.parent for p in package.rglob("__init__.py")
    }


def test_imports_without_torch_and_tensorflow():
    """All modules import where no extra is installed: a finder stands in for that."""
    code = """
import importlib, pkgutil, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in (
            "torch", "tensorflow", "tensorflow_datasets", "ftfy", "bs4", "tokenizers", "sentencepiece",
            "pyarrow",
        ):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import vapi_jax
names = [m.name for m in pkgutil.walk_packages(vapi_jax.__path__, "vapi_jax.")]
for name in names:
    if not name.endswith("__main__"):  # a command of its own, whose flags may be another's
        importlib.import_module(name)
print(len(names))
"""
    run = commands.python("-c", code)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 20
