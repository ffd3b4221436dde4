"""The pages and the messages: names can be imported, links lead somewhere, code is code, commands name programs."""

import ast
import contextlib
import importlib
import json
import pathlib
import re
import types

import own_optimizers
import pytest
from own_optimizers import code_blocks

import keras_curvature as kc

HOME = pathlib.Path(__file__).parent.parent
README = HOME / "README.md"
GUIDES = sorted((HOME / "examples" / "guides").glob("*.md"))
PAGES = [README, HOME / "examples" / "README.md", HOME / "tpu" / "README.md", *GUIDES]
SOURCES = [
    path for folder in ("keras_curvature", "examples", "tpu") for path in sorted((HOME / folder).rglob("*.py"))
]  # fmt: skip
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HOME)))

DOTTED = re.compile(r"(?<![\w./])(?:keras_curvature|kc)((?:\.[A-Za-z_]\w*)+)")
IMPORTED = re.compile(r"from (keras_curvature[\w.]*) import (\w+(?: as \w+)?(?:, \w+(?: as \w+)?)*)")


# Names.


def strings(path):
    """All string literals of a Python file: docstrings, messages, and the parts of f-strings."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def names(text):
    """The names of the package that a text tells its reader to write, in full."""
    for dotted in DOTTED.findall(text):
        yield "keras_curvature" + dotted
    for module, imported in IMPORTED.findall(text):
        for name in imported.split(", "):
            yield f"{module}.{name.split(' as ')[0]}"


def resolves(name):
    """Whether `import` and attributes lead to the name."""
    found = importlib.import_module("keras_curvature")
    for end, part in enumerate(name.split(".")[1:], 2):
        if isinstance(found, types.ModuleType) and not hasattr(found, part):
            with contextlib.suppress(ImportError):
                importlib.import_module(".".join(name.split(".")[:end]))
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("name", ["kc.Neumann", "kc.callbacks.Checkpoint", "keras_curvature.operators.Identity"])
def test_names_are_collected_and_found(name):
    (found,) = names(f"Use `{name}(model)`.")
    assert resolves(found)
    assert not resolves(f"{found}Typo")
    assert list(names("from keras_curvature.solvers import Solver, Other as O")) == [
        "keras_curvature.solvers", "keras_curvature.solvers.Solver", "keras_curvature.solvers.Other",
    ]  # fmt: skip


def test_every_name_that_a_message_or_docstring_says_can_be_imported():
    wrong = {(str(path.relative_to(HOME)), name) for path in SOURCES for name in names(strings(path))}
    wrong = sorted((path, name) for path, name in wrong if not resolves(name))
    assert not wrong


@every_page
def test_every_name_that_a_page_says_can_be_imported(page):
    assert not [name for name in names(page.read_text()) if not resolves(name)]


# Pages.


def test_the_readme_fits_on_a_few_screens():
    text = README.read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1200


def test_the_table_of_methods_has_every_optimizer_once():
    table = README.read_text().split("\n| method |")[1].split("\n\n")[0]
    rows = "\n".join(line.split("|")[1] for line in table.splitlines()[2:] if line.startswith("|"))
    assert sorted(re.findall(r"`(\w+)`", rows)) == sorted(set(kc.optimizers.__all__) - {"CurvatureOptimizer"})


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_a_guide_opens_with_the_question_that_it_answers(page):
    first = page.read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith("?")


def anchors(page):
    """What `#...` may name on a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@every_page
def test_code_is_python(page):
    for block in code_blocks(page):
        compile(block, page.name, "exec")


@every_page
def test_commands_name_programs(page):
    for program in re.findall(r"python ((?:[\w-]+/)*[\w-]+\.py)", page.read_text()):
        assert (HOME / program).exists(), program


def test_every_example_is_in_the_index():
    index = (HOME / "examples" / "README.md").read_text()
    # parts of other programs
    shared = {"measuring.py", "torch_peers.py", "least_squares_peers.py", "play.py", "contestants.py"}
    for path in (HOME / "examples").rglob("*.py"):
        assert path.name in shared or f"python {path.relative_to(HOME)}" in index, path.name
    for guide in GUIDES:
        assert f"(guides/{guide.name})" in index


# The guide's code runs; its classes are in the registry of `optimizers.py`, under every property.


def test_the_code_of_the_guide_trains():
    scope, ran = vars(own_optimizers).copy(), []
    for block in code_blocks(own_optimizers.GUIDE):
        if block not in own_optimizers.DEFINITIONS:
            exec(compile(block, own_optimizers.GUIDE.name, "exec"), scope)
            ran.append(scope["history"].history)
    lion, newton = ran
    assert lion["loss"][-1] < lion["loss"][0] and newton["loss"][-1] < 0.5 * newton["loss"][0]
    assert 1 <= newton["solver_steps"][-1] <= 5
    json.dumps(scope["model"].optimizer.get_config())


@pytest.mark.parametrize("block", own_optimizers.DEFINITIONS, ids=["gradient", "curvature"])
def test_a_method_of_the_guide_takes_30_lines(block):
    lines = block[block.index("@keras.saving") :].splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


def test_the_methods_of_the_guide_are_named_in_the_registry_alone():
    others = [path for path in (HOME / "tests").glob("*.py") if path.name not in ("optimizers.py", "test_pages.py")]
    assert not [path.name for path in others if re.search(r"\blion\b|damped_gauss_newton", path.read_text())]


@every_page
def test_paths_in_the_text_exist(page):
    for path in re.findall(r"`((?:keras_curvature|tests|tpu|examples)/[\w./]*)`", page.read_text()):
        assert (HOME / path).exists(), path
