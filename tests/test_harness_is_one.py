"""What tests and scripts share is written once: read from the source."""

import ast
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FILES = [p for folder in ("tests", "scripts") for p in sorted((REPOSITORY / folder).rglob("*.py"))]
#: Tests of the command lines that the product itself makes.
OF_THE_PRODUCT = ("tests/launch/", "tests/container/")


def named(text: str) -> set[str]:
    """The files that have a text in a string, this one and tests of the product's aside."""
    return {
        str(path.relative_to(REPOSITORY))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and text in node.value
        if path != Path(__file__)
        if not str(path.relative_to(REPOSITORY)).startswith(OF_THE_PRODUCT)
    }


def test_torchrun_is_started_in_one_place() -> None:
    started = {f for f in named("torch.distributed.run") if "test_args" not in f}
    assert started == {"tests/harness/trainer.py"}


def test_the_log_of_a_training_is_read_in_one_place() -> None:
    assert named(r"iteration +(\d+)/.*?") == {"tests/harness/runs.py"}


def test_no_helper_is_written_twice() -> None:
    """Functions of the same name and body in two files, docstrings and types aside."""
    places: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith(("test_", "main")):
                body = node.body[ast.get_docstring(node) is not None :]
                text = "\n".join(map(ast.unparse, body))
                places[node.name, text].add(str(path.relative_to(REPOSITORY)))
    twice = {name: found for (name, _), found in places.items() if len(found) > 1}
    assert not twice, twice


def test_no_test_is_a_library_of_others() -> None:
    """What several files need of one stands in a module without tests of its own."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").rpartition(".")[2].startswith("test_"), path


def test_tensors_are_made_and_compared_in_one_place() -> None:
    helpers = {"bits", "bitwise", "copied", "misaligned", "numbers", "random", "written"}
    defined = {
        (node.name, str(path.relative_to(REPOSITORY)))
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name in helpers
    }
    assert defined == {(name, "tests/harness/tensors.py") for name in helpers}
