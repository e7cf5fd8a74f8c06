"""The shape of the house: who may import whom, where libraries are fenced in, how long files are.

The files are read, not run. To add a module, add its name to ROWS.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]

# A module imports only from lower rows, and within its row only from its own package (llama_jax.x,
# or sharding). A name stands for all modules below it, but for those that have a line of their own.
# A new module goes into the lowest row that is above everything it needs.
ROWS = {
    10: ["main"],
    9: ["llama_jax.cli"],
    8: [  # commands that use everything
        "llama_jax.ablate",
        *("llama_jax.demo", "llama_jax.models", "llama_jax.chat"),
        *("llama_jax.generate.command", "llama_jax.evaluate.command"),
    ],
    7: ["llama_jax"],  # __init__.py alone: the api under its short name
    6: ["llama_jax.api"],
    5: ["llama_jax.convert", "llama_jax.evaluate", "llama_jax.plan"],
    4: [
        *("llama_jax.train", "llama_jax.generate"),  # these two do not know each other
        "llama_jax.tokenizer.train",  # reads a corpus, while data.prepare reads tokenizers
    ],
    3: [
        *("llama_jax.data", "llama_jax.model.llama", "llama_jax.model.layout"),
        "llama_jax.model.count",
    ],
    2: [
        *("llama_jax.model.attention", "llama_jax.model.feed_forward", "llama_jax.model.moe"),
        *("llama_jax.model.layer", "llama_jax.model.stack"),
        *("llama_jax.model.layer_cache", "llama_jax.model.cache", "llama_jax.model.param"),
        *("llama_jax.tokenizer", "llama_jax.chat.settings"),
    ],
    1: [
        "llama_jax.model.ops",
        *("llama_jax.convert.names", "llama_jax.convert.settings"),
        *("llama_jax.generate.settings", "llama_jax.evaluate.settings"),
        "llama_jax.ablate.settings",
        *("llama_jax.plan.settings", "llama_jax.plan.hardware"),
        *("llama_jax.flags", "llama_jax.process", "llama_jax.train.supervisor"),
    ],
    0: ["llama_jax.config", "sharding"],
}

# The modules that import others when they are asked for, so that `--help` and `import llama_jax`
# need no jax.
ON_DEMAND = ("llama_jax", "llama_jax.cli")

# Library -> the only modules that may import it.
FENCES = {
    "flax": ("llama_jax.model",),
    "orbax": ("llama_jax.train.checkpoint",),
}

# All that is used of flax.linen: a thin slice, with which a port would touch a few hundred lines.
LINEN = {"Module", "compact", "initializers", "meta"}

# Import name -> the name in pyproject.toml, where they differ, or what brings it along.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "pydantic_core": "pydantic",
    "ml_dtypes": "jax",
}

FORBIDDEN_NAMES = r"(utils?|helpers?|common|misc|managers?)(_.*)?|.*_(utils?|helpers?|managers?)"


def lines_allowed(module: str) -> int:
    """What decides the numbers must be readable in an afternoon."""
    return 400 if module.startswith(("llama_jax.model", "sharding")) else 600


def paths() -> Iterator[Path]:
    yield REPOSITORY / "main.py"
    for folder in ("llama_jax", "sharding"):
        yield from sorted((REPOSITORY / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """llama_jax/model/llama.py -> llama_jax.model.llama; an __init__.py is its package."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in paths()}


class Import(NamedTuple):
    """One imported name, as far as it is a module; top: as soon as the importing file is loaded."""

    target: str
    top: bool


def is_ours(target: str) -> bool:
    return target.split(".")[0] in ("llama_jax", "sharding", "main")


def imports(source: str, modules: Mapping[str, str] = SOURCES) -> Iterator[Import]:
    """Everything a file imports, at its top or inside a function, class, `if` or `try`."""
    tree = ast.parse(source)
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node in top)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(full if full in modules else str(node.module), node in top)


def named_modules(source: str, modules: Mapping[str, str] = SOURCES) -> Iterator[str]:
    """Our modules that a file names in a text, to import them later: "llama_jax.demo:demo"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.split(":")[0]
            if name in modules:
                yield name


def own_imports(module: str) -> set[str]:
    """Our modules that one of ours imports, on demand too."""
    found = {target for target, _ in imports(SOURCES[module]) if is_ours(target)}
    return found | set(named_modules(SOURCES[module]) if module in ON_DEMAND else ())


GRAPH = {module: own_imports(module) for module in SOURCES}


def is_empty(module: str) -> bool:
    """An __init__.py with a docstring and nothing else takes no part."""
    return all(isinstance(node, ast.Expr) for node in ast.parse(SOURCES[module]).body)


def row(module: str) -> int:
    """The row of the module, or of the nearest package above it that has one."""
    rows = {name: number for number, names in ROWS.items() for name in names}
    name = module
    while name and (name != "llama_jax" or module == "llama_jax"):
        if name in rows:
            return rows[name]
        name = name.rpartition(".")[0]
    raise AssertionError(
        f"{module} has no row: add it to ROWS in tests/test_architecture.py, in the lowest row "
        "that is above everything it imports"
    )


def package(module: str) -> str:
    """What may import within its own row: sharding, llama_jax.model, llama_jax.train, ..."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "llama_jax" else parts[0]


def may_import(module: str, target: str) -> bool:
    own = row(module), package(module)
    other = row(target), package(target)
    return other[0] < own[0] or other == own


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first of them again at the end; or nothing."""
    done: set[str] = set()

    def search(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := search(target, [*trail, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := search(module, []))), [])


# --- who imports whom ------------------------------------------------------------------------


@pytest.mark.parametrize("module", [module for module in SOURCES if not is_empty(module)])
def test_imports_go_down(module):
    for target in GRAPH[module]:
        assert target in SOURCES, f"{module} imports {target}, which does not exist"
        assert may_import(module, target), (
            f"{module} (row {row(module)}) imports {target} (row {row(target)}): a module imports "
            "from lower rows of ROWS, or from its own package in its own row. Hand the value in as "
            "an argument, or move what both need into a lower module"
        )
    assert row(module) >= 0


def test_every_line_of_the_table_is_in_use():
    for name in (name for names in ROWS.values() for name in names):
        assert name in SOURCES, f"{name} is gone: delete it from ROWS"
    for name in ON_DEMAND:
        assert name in SOURCES, f"{name} is gone: delete it from ON_DEMAND"


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("llama_jax.model.llama", "llama_jax.model.cache", True),
        ("llama_jax.model.cache", "llama_jax.model.llama", False),
        ("llama_jax.model.attention.grouped_query", "llama_jax.model.cache", True),
        ("llama_jax.model.cache", "llama_jax.tokenizer", False),  # same row, another package
        ("llama_jax.train.loop", "llama_jax.train.step", True),
        ("llama_jax.train.loop", "llama_jax.generate.decode", False),
        ("llama_jax.generate.decode", "llama_jax.train.checkpoint", False),
        ("llama_jax.convert.names", "llama_jax.convert.huggingface", False),
        ("llama_jax.model.llama", "llama_jax.data.loader", False),
        ("sharding.partition", "sharding.rules", True),
        ("sharding.rules", "llama_jax.config", False),
        ("llama_jax.config", "sharding.rules", False),
        ("llama_jax.data.prepare", "llama_jax", False),  # the api by its short name
        ("llama_jax.demo", "llama_jax", True),
    ],
)
def test_the_table_is_read_as_it_is_meant(module, target, allowed):
    assert may_import(module, target) is allowed


@pytest.mark.parametrize("module", ["llama_jax.new", "llama_jax.model.new", "llama_jax.model"])
def test_a_module_without_a_row_is_told_where_to_go(module):
    with pytest.raises(AssertionError, match=f"{module} has no row: add it to ROWS in tests/"):
        row(module)


def test_no_module_imports_itself_in_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    found = circle(GRAPH)
    assert not found, " imports ".join(found)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_are_absolute(module):
    """They can be searched for, and the other tests here see them."""
    assert not re.findall(r"^\s*from \..*", SOURCES[module], re.MULTILINE)


@pytest.mark.parametrize("module", sorted(set(SOURCES) - set(ON_DEMAND)))
def test_our_own_modules_are_imported_at_the_top(module):
    """An import inside a function, `if` or `try` is how circles hide."""
    source = SOURCES[module]
    inside = [target for target, top in imports(source) if is_ours(target) and not top]
    assert not inside, f"{module} imports {inside} below its top level"
    dynamic = re.findall(r"\b(?:import_module|__import__)\b", source)
    assert not dynamic, f"{module} imports by name; ON_DEMAND says who may"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import sharding.mesh", [("sharding.mesh", True)]),
        ("from llama_jax import config as c", [("llama_jax.config", True)]),
        ("from llama_jax.config import read", [("llama_jax.config", True)]),
        ("from llama_jax import load", [("llama_jax", True)]),
        ("def f():\n  import sharding.mesh", [("sharding.mesh", False)]),
        ("class A:\n  from llama_jax import cli", [("llama_jax.cli", False)]),
        ("if True:\n  from llama_jax.config import read", [("llama_jax.config", False)]),
        ("try:\n  import flax.linen as nn\nexcept E: ...", [("flax.linen", False)]),
        ("import a, b", [("a", True), ("b", True)]),
    ],
)
def test_imports_are_recognised(source, expected):
    assert list(imports(source)) == expected


def test_what_the_command_line_imports_on_demand_counts_too():
    source = 'COMMANDS = {"a": ("llama_jax.demo:demo", "llama_jax.nothing:f", "sharding")}'
    assert list(named_modules(source)) == ["llama_jax.demo", "sharding"]
    assert "llama_jax.demo" in GRAPH["llama_jax.cli"]
    assert "llama_jax.api" in GRAPH["llama_jax"]


@pytest.mark.parametrize("module", ["llama_jax.config", "llama_jax.cli"])
def test_configuration_and_help_need_no_jax(module):
    program = f"import {module}, sys; print([m for m in ('jax', 'flax') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# --- libraries -------------------------------------------------------------------------------


def libraries(module: str, top: bool | None = None) -> set[str]:
    """What a module imports that is neither ours nor Python's: all, at its top, or below."""
    return {
        target.split(".")[0]
        for target, is_top in imports(SOURCES[module])
        if top in (None, is_top) and not is_ours(target)
    } - set(sys.stdlib_module_names)


@pytest.mark.parametrize("library", FENCES)
def test_a_library_stays_behind_its_fence(library):
    users = {module for module in SOURCES if library in libraries(module)}
    assert users, f"nobody uses {library}: delete it from FENCES"
    outside = {m for m in users if not f"{m}.".startswith(tuple(f"{f}." for f in FENCES[library]))}
    assert not outside, f"{library} may be imported only in {FENCES[library]}"


def test_of_linen_a_thin_slice_is_used():
    used = {
        name
        for module, source in SOURCES.items()
        if "flax" in libraries(module)
        for name in re.findall(r"(?<![\w.])nn\.(\w+)", source)
    }
    assert used == LINEN


def test_sharding_knows_jax_and_numpy_only():
    used = set().union(*(libraries(m) for m in SOURCES if package(m) == "sharding"))
    assert used == {"jax", "numpy"}


def declared(group: str | None = None) -> set[str]:
    """Distributions that pyproject.toml requires, or those of an optional group."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["optional-dependencies"][group] if group else project["dependencies"]
    return {re.split(r"[\[<>=~! ]", line)[0].lower() for line in wanted}


def distributions(libraries: set[str]) -> set[str]:
    return {DISTRIBUTIONS.get(name, name).replace("_", "-").lower() for name in libraries}


@pytest.mark.parametrize("module", SOURCES)
def test_what_loads_with_a_module_is_a_required_dependency(module):
    """Optional and heavy libraries are imported in the function that needs them."""
    missing = distributions(libraries(module, top=True)) - declared()
    assert not missing, f"{module}: not among the dependencies of pyproject.toml"


@pytest.mark.parametrize("module", SOURCES)
def test_what_a_function_imports_is_declared_too(module):
    extras = declared("convert") | declared("data") | declared("evaluate")
    extras |= declared("serve") | declared("track")
    missing = distributions(libraries(module, top=False)) - declared() - extras
    assert not missing, f"{module}: neither a dependency nor an extra of pyproject.toml"


def test_the_lock_pins_by_hash_alone():
    """Where packages come from is the user's choice: the lock names no address."""
    lines = (REPOSITORY / "requirements" / "dev.lock").read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if re.match(r"[a-z0-9]", line)]
    hashes = [line for line in lines if re.match(r"    --hash=sha256:[0-9a-f]{64}( \\)?$", line)]
    assert len(packages) > 50
    assert len(packages) + len(hashes) == len(lines), "a line that is neither package nor hash"
    for line in packages:
        assert re.fullmatch(r"[\w.-]+==[\w.+-]+( ; [^/]+)? \\", line), line


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", SOURCES)
def test_files_are_short(module):
    lines = len(SOURCES[module].splitlines())
    assert lines <= lines_allowed(module), f"{module} has {lines} lines: split it where it divides"


@pytest.mark.parametrize("path", list(paths()), ids=module_name)
def test_files_say_what_they_hold(path):
    names = [path.stem, *path.relative_to(REPOSITORY).parts[:-1]]
    vague = [name for name in names if re.fullmatch(FORBIDDEN_NAMES, name)]
    assert not vague, "a name that fits everything says nothing"


@pytest.mark.parametrize(
    ("name", "vague"),
    [
        *((name, True) for name in ("utils", "util", "helpers", "common", "misc", "manager")),
        *((name, True) for name in ("train_utils", "utils_io", "checkpoint_manager")),
        *((name, False) for name in ("loader", "management", "ops", "distributed")),
    ],
)
def test_vague_names_are_recognised(name, vague):
    assert bool(re.fullmatch(FORBIDDEN_NAMES, name)) is vague


def test_one_number_is_read_in_few_places():
    """n_kv_heads is written in a YAML file, checked once and only read after that."""
    files = [
        module
        for module, source in SOURCES.items()
        if re.search(r"\bn_kv_heads\b", source) and "model.attention" not in module
    ]
    assert "llama_jax.config.model" in files
    assert len(files) <= 8, files
