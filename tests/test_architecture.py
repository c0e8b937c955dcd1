"""Who may import whom, what no file may contain, and that what is shipped can be used."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import peftcli
from peftcli import methods, recipe

PACKAGE = Path(peftcli.__file__).parent
RECIPES = PACKAGE.parent / "recipes"

LAYERS = (
    {"cli", "__main__"},
    {"run"},
    {"models", "data", "training", "checkpoint", "merge", "evaluation", "manifest", "attention"},
    {"sharding"},
    {"inject"},
    {"targets"},
    {"sites"},
    {"methods", "ops", "quantization", "architectures"},
    {"recipe", "reporting", "hub", "processes", "startup", "vetting", "locks"},
    {"files", "headers"},
    {"errors", "__init__"},
)
"""The parts from top to bottom. A part imports from its own layer or from one below, and never in a circle."""

SIDEWAYS = {
    ("training", "checkpoint"),  # the loop saves and resumes
    ("training", "data"),  # and takes batches
    ("evaluation", "data"),
    ("evaluation", "training"),  # the loss is one function for both
    ("merge", "models"),  # where transformers finds a parameter in a checkpoint
    ("merge", "checkpoint"),  # an adapter is what is read from its files
    ("manifest", "checkpoint"),
    ("manifest", "data"),  # what was learned from is told by its kind
    ("manifest", "models"),  # and how to load the model again
    ("methods", "ops"),
}
"""Who imports from a part of its own layer; anything new here is a decision."""

ONLY_IN = {
    "typer": {"cli"},
    "rich": {"cli"},
    "accelerate": {"training", "run"},
    "deepspeed": {"training"},
    "transformers": {"models", "data", "evaluation", "sites", "attention"},
    "huggingface_hub": {"models", "data", "hub"},
    "datasets": {"data"},
    "yaml": {"recipe"},
}
WITHOUT_TORCH = ("cli", "recipe", "errors", "reporting", "files", "locks", "processes", "startup", "__main__")


def part_of(path):
    """Returns the part of the package that a file belongs to, such as `training`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def files():
    return sorted(PACKAGE.rglob("*.py"))


@cache
def imports(path):
    """Returns what a file imports, as (module, line, whether for types only, whether at import time)."""
    found = []

    def visit(node, types_only, at_once):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            types_only = True
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            at_once = False
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # `from peftcli import files` names the part only in what it imports.
            names = [f"peftcli.{alias.name}" if node.module == "peftcli" else node.module for alias in node.names]
        found.extend((name, node.lineno, types_only, at_once) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, types_only, at_once)

    visit(ast.parse(path.read_text(encoding="utf-8")), False, True)
    return tuple(found)


def own_part(module):
    """Returns the part that a module of peftcli's belongs to; `__init__` for its version and nothing else."""
    name = module.split(".")[1] if "." in module else "__init__"
    return "__init__" if name == "__version__" else name


def layer_of(part):
    return next((index for index, layer in enumerate(LAYERS) if part in layer), None)


def test_every_part_has_a_layer():
    assert {part_of(path) for path in files()} <= set().union(*LAYERS)


def test_imports_point_downward():
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {module}"
        for path in files()
        for module, line, types_only, _ in imports(path)
        if module.split(".")[0] == "peftcli"
        and not types_only
        and (layer_of(own_part(module)) is None or layer_of(own_part(module)) < layer_of(part_of(path)))
    ]
    assert not wrong


def test_no_parts_import_each_other():
    graph = {}
    for path in files():
        for module, _, types_only, _ in imports(path):
            if module.split(".")[0] == "peftcli" and not types_only and own_part(module) != part_of(path):
                graph.setdefault(part_of(path), set()).add(own_part(module))
    order = list(TopologicalSorter(graph).static_order())  # raises on a circle
    assert order.index("errors") < order.index("training") < order.index("run") < order.index("cli")
    sideways = {(one, other) for one, others in graph.items() for other in others if layer_of(one) == layer_of(other)}
    assert sideways - {("__main__", "cli")} == SIDEWAYS


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_where_they_belong(library):
    users = {
        part_of(path)
        for path in files()
        for module, _, types_only, _ in imports(path)
        if module.split(".")[0] == library and not types_only
    }
    assert users
    assert users <= ONLY_IN[library]


def test_methods_and_ops_are_mathematics():
    for path in files():
        if part_of(path) in ("methods", "ops"):
            tops = {module.split(".")[0] for module, _, types_only, _ in imports(path) if not types_only}
            known = {"torch", "pydantic", "peftcli", "__future__", "collections", "dataclasses", "functools", "hashlib"}
            assert tops <= known | {"contextlib", "importlib", "math", "pathlib", "re", "typing", "weakref"}, path


def test_torch_is_imported_late():
    """Directly; that nothing pulls it in on the way is `tests/cli/test_startup.py`'s."""
    for path in files():
        if part_of(path) in WITHOUT_TORCH:
            early = [module for module, _, types_only, at_once in imports(path) if at_once and not types_only]
            assert not any(module.split(".")[0] in ("torch", "transformers", "datasets") for module in early), path


def calls(path):
    """Yields the name of each thing that a file calls, and its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize(
    "forbidden", ["torch.load", "eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system", "__import__"]
)
def test_nothing_can_run_what_it_reads(forbidden):
    found = [f"{path.name}:{node.lineno}" for path in files() for name, node in calls(path) if name == forbidden]
    if forbidden == "yaml.load":  # with a loader of its own, that makes only plain values
        found = [place for place in found if not place.startswith("syntax.py")]
    assert not found


def test_no_pickle_and_no_shell():
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "subprocess"}
    used = {module.split(".")[0] for path in files() for module, _, _, _ in imports(path)}
    assert not used & forbidden


def test_no_code_from_a_models_folder():
    """`trust_remote_code` is written once, and as False."""
    written = [
        ast.unparse(node)
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Dict) and any(ast.unparse(key) == "'trust_remote_code'" for key in node.keys if key))
        or (isinstance(node, ast.keyword) and node.arg == "trust_remote_code")
    ]
    assert written
    assert all("'trust_remote_code': False" in text for text in written)


def test_every_file_and_function_says_what_it_is():
    for path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        for node in tree.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            assert not public or ast.get_docstring(node), f"{path}: {node.name}"


def test_a_method_is_one_file():
    for name in methods.names():
        config = methods.load(name).Config
        assert config.model_fields["type"].default == name
        assert config.model_config["extra"] == "forbid"
        assert config.model_config["frozen"]
        assert methods.load(name).default_learning_rate > 0


def shipped():
    return sorted(RECIPES.glob("**/*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_recipe_can_be_used(path):
    loaded = recipe.load(path)
    fields = dict(loaded.recipe.method)
    methods.load(fields["type"]).Config.model_validate(fields)
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line.lstrip("#").strip())
    assert header, "a recipe begins with a title"
    assert header[0][0].isupper()
    assert header[0].endswith(".")
    command = f"peftcli train {path.relative_to(RECIPES.parent)}"
    assert any(line.startswith(command) for line in header), f"the header has no line `{command}`"


def test_there_are_recipes():
    assert len(shipped()) >= 1
    assert RECIPES / "quickstart.yaml" in shipped()


def test_every_method_has_a_recipe_that_runs_anywhere():
    """On a demo model and data that ships; what needs a hub model is a paper's, or the example for a GPU."""
    runnable = set()
    for path in set(RECIPES.glob("*.yaml")) - {RECIPES / "dora_llama.yaml"}:
        loaded = recipe.load(path).recipe
        assert Path(loaded.model.name).parent == Path("~/.cache/peftcli").expanduser(), path.name
        assert all(source.path.startswith("recipes/data/") for source in loaded.data.train), path.name
        runnable.add(loaded.method["type"])
    assert runnable == set(methods.names())


def test_recipes_are_for_data_and_models_that_a_user_has():
    """A path in a recipe that ships must ship too, or be said in the header."""
    for path in shipped():
        loaded, header = recipe.load(path), path.read_text(encoding="utf-8").split("\n\n")[0]
        for source in (*loaded.recipe.data.train, *(loaded.recipe.data.eval or ())):
            if source.path.startswith("recipes/"):
                assert (RECIPES.parent / source.path).exists(), f"{path.name}: {source.path}"
        if loaded.recipe.model.name.startswith((".", "/", "~")):
            assert "model" in header, path.name
