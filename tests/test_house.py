"""Who knows whom, what the package holds and what the wheel ships: read from the source."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "megatron_s3"

#: Each room, and those that it may know beside itself and the modules of the package's top.
KNOWS = {
    "rules": set(),
    "storage": set(),
    "kernels": {"rules"},
    "optimizers": {"rules", "kernels"},
    "telemetry": {"rules", "kernels", "optimizers"},
    "report": {"telemetry", "storage"},
    "mcore": {"rules", "kernels", "optimizers", "telemetry", "storage"},
    "data": {"storage", "mcore"},
    "launch": {"optimizers", "storage", "mcore", "data"},
    "checkpoints": {"optimizers", "storage", "mcore", "data", "report"},
    "bridge": {"optimizers", "telemetry", "mcore"},
}

#: What every room may know.
FOR_ALL = {"errors", "folders", "log", "paper", "renamed", "version"}

#: Where Megatron is imported, beside mcore: what extends a class of Megatron-Bridge's has to
#: import it, and Megatron with it.
KNOW_MEGATRON = {"bridge", "pretrain_gpt"}

#: What a training, a verb, the quickstart, a job's script or a program of a framework's starts.
STARTED = (
    *("", "pretrain_gpt", "__main__", "cli", "quickstart", "launch.preflight"),
    *("bridge", "verl_plugin"),
)


@cache
def imported(path: Path, texts: bool = False) -> frozenset[str]:
    """What a file imports, wherever the import stands; with ``texts`` what it names in strings."""

    def found() -> Iterator[str]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif texts and isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value

    return frozenset(found())


#: The package's files, by the names of their modules.
PRODUCT = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (REPOSITORY / PACKAGE).rglob("*.py")
}


def edges() -> Iterator[tuple[str, str]]:
    """Who imports whom inside the package, without its name."""
    for name, path in PRODUCT.items():
        for other in imported(path) & PRODUCT.keys() - {name}:
            if not name.startswith(f"{other}."):  # a package of its own modules
                yield name.partition(".")[2], other.partition(".")[2]


def room(name: str) -> str:
    """The room of a module; the name of a module of the package's top."""
    return name.partition(".")[0]


def test_every_room_knows_those_below_it_alone() -> None:
    rooms = {path.parent.name for path in (REPOSITORY / PACKAGE).glob("*/__init__.py")}
    assert rooms == KNOWS.keys()
    wrong = {
        (name, other)
        for name, other in edges()
        if room(name) in KNOWS and room(other) not in (room(name), *KNOWS[room(name)], *FOR_ALL)
    }
    assert not wrong


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count too: they hide a circle, and do not undo it."""
    below: dict[str, set[str]] = {}
    for name, other in edges():
        below.setdefault(name, set()).add(other)
    while below:
        ends = {name for name, others in below.items() if not others & below.keys()}
        assert ends, f"a circle in {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in ends}


def test_megatron_is_imported_in_few_places() -> None:
    for name, path in PRODUCT.items():
        inside = room(name.partition(".")[2])
        knows = any(other.partition(".")[0] == "megatron" for other in imported(path))
        assert not knows or inside == "mcore" or inside in KNOW_MEGATRON, name


def test_the_product_imports_no_scripts_and_no_tests() -> None:
    for name, path in PRODUCT.items():
        for other in imported(path, texts=True):
            assert (
                other.partition(".")[0] not in ("scripts", "tests")
                or " " in other
                or ("/" in other or "." not in other)
            ), (name, other)


def test_every_module_is_reached() -> None:
    """By imports and by names in strings, from what users start."""
    seen: set[str] = set()
    todo = [f"{PACKAGE}.{name}".rstrip(".") for name in STARTED]
    while todo:
        name = todo.pop()
        if name in PRODUCT and name not in seen:
            seen.add(name)
            todo += [name.rpartition(".")[0], *imported(PRODUCT[name], texts=True)]
    assert PRODUCT.keys() - seen == set()


def test_the_wheel_holds_the_product_and_no_more(tmp_path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "tests", "__pycache__")
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {n for n in zipfile.ZipFile(wheel).namelist() if not n.startswith(f"{PACKAGE}-")}
    product = {p for p in (source / PACKAGE).rglob("*") if p.is_file() and p.suffix != ".md"}
    configurations = (source / "configs").rglob("*.yaml")
    assert shipped == {
        *(str(path.relative_to(source)) for path in product),
        *(f"{PACKAGE}/{path.relative_to(source)}" for path in configurations),
        f"{PACKAGE}/scripts/pretrain.sbatch",
    }


class _Replacements(ast.NodeVisitor):
    """The functions of a module that assign to what is Megatron's, or take its code apart.

    Megatron's are the names that are imported from it, parameters that are annotated with one, and
    what a loop or an assignment takes from one of these.
    """

    def __init__(self, module: str) -> None:
        self.module, self.scope, self.found = module, [], set()
        self.imported: set[str] = set()
        self.taken: set[str] = set()

    def visit_Import(self, node: ast.Import) -> None:
        self.imported |= {a.asname or a.name for a in node.names if a.name.startswith("megatron.")}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module.split(".")[0] == "megatron":
            self.imported |= {alias.asname or alias.name for alias in node.names}

    def _mentions(self, node: ast.AST | None) -> bool:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if node else set()
        return bool(names & (self.imported | self.taken))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scope.append(node.name)
        before = set(self.taken)
        arguments = [*node.args.args, *node.args.kwonlyargs]
        self.taken |= {a.arg for a in arguments if self._mentions(a.annotation)}
        self.generic_visit(node)
        self.taken = before
        self.scope.pop()

    def visit_For(self, node: ast.For) -> None:
        if self._mentions(node.iter):
            self.taken |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
        self.generic_visit(node)

    def _target(self, node: ast.expr) -> None:
        if isinstance(node, ast.Attribute | ast.Subscript):
            root = node.value
            direct = isinstance(root, ast.Name)
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            known = self.imported if not direct else self.imported | self.taken
            name = getattr(node, "attr", "")
            if name in ("__class__", "__code__") or (
                isinstance(root, ast.Name) and root.id in known
            ):
                self.found.add(".".join([self.module, *self.scope]))

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                self._target(each)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._target(node.target)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        replaces = called in ("setattr", "delattr") or called.endswith(("patch.object", ".setattr"))
        code = any(keyword.arg == "co_consts" for keyword in node.keywords)
        if code or (replaces and self._mentions(node.args[0])):
            self.found.add(".".join([self.module, *self.scope]))
        self.generic_visit(node)


def test_what_is_replaced_of_megatrons_is_among_the_seams() -> None:
    """And each of the seams that says by what it is replaced is replaced there."""
    found = set()
    for name, path in PRODUCT.items():
        visitor = _Replacements(name.removeprefix(f"{PACKAGE}.mcore."))
        visitor.visit(ast.parse(path.read_text()))
        found |= visitor.found
    seams = ast.parse(PRODUCT[f"{PACKAGE}.mcore.seams"].read_text())
    listed = {
        node.value.value
        for node in ast.walk(seams)
        if isinstance(node, ast.keyword) and node.arg == "by"
    }
    assert found == listed


def test_the_overview_names_every_module() -> None:
    """Each that stands in ``megatron_s3/mcore/__init__.py`` is there, and the reverse."""
    overview = ast.get_docstring(ast.parse(PRODUCT[f"{PACKAGE}.mcore"].read_text()))
    there = {path.stem for path in (REPOSITORY / PACKAGE / "mcore").glob("[a-z]*")}
    named = set(re.findall(r"``(\w+)\*?``", overview))
    assert {n for n in there if not n.startswith("compat_")} == named - {"compat_"}


def test_what_is_global_is_of_the_process() -> None:
    """A compiled kernel, threads, the device; and the training that runs, in one object."""
    found = {
        (name.removeprefix(f"{PACKAGE}."), variable)
        for name, path in PRODUCT.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Global)
        for variable in node.names
    }
    assert found == {
        ("kernels.cpu.build", "_lock"),
        ("kernels.cpu.threads", "_threads"),
        ("kernels.cpu.threads", "_threads_count"),
        ("mcore.cpu_device", "_active"),
        ("mcore.state", "_running"),
    }


def test_errors_have_one_base_and_names_of_their_own() -> None:
    """An error is a class that derives from one of Python's; its name says which."""
    found: dict[str, list[str]] = {}
    for name, path in PRODUCT.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                if any(re.search(r"(Error|Exception)$", base) for base in bases):
                    found.setdefault(node.name, []).append(name)
                    assert bases[0] == "MegatronS3Error" or node.name == "MegatronS3Error", (
                        node.name
                    )
    assert {name: where for name, where in found.items() if len(where) > 1} == {}
    assert len(found) > 20


#: What belongs to S3 alone; the package exports the class, by its name.
OF_S3 = {"", "optimizers.s3", "rules.s3"}

#: Where S3's name stands beside that, outside ``__all__``: as data, and why.
NAMES_S3 = {
    "quickstart": "the runs that it shows",
    "report.compare": "the paper's own optimizer, which reports of logs set beside others",
    "report.styles": "each optimizer's own style in pictures",
}


def _is_s3(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and str(node.value).lower() in ("s3", "--optimizer s3")


def test_s3_is_in_no_condition_outside_its_own_files() -> None:
    """Neither compared, looked up in a collection, matched, nor asked for as a beginning."""
    asks = (ast.Compare, ast.MatchValue, ast.Call)
    compared, named = set(), set()
    for name, path in PRODUCT.items():
        module = name.removeprefix(PACKAGE).lstrip(".")
        if module in OF_S3:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                continue
            for part in ast.walk(node):
                if _is_s3(part):
                    named.add(module)
                if isinstance(part, asks) and any(map(_is_s3, ast.walk(part))):
                    compared.add(f"{module}:{part.lineno}")
    assert not compared
    assert named == NAMES_S3.keys()


#: With these no sentence begins that says what a function does.
NO_VERBS = frozenset(
    "A All An And As Both By Each Every For From How If In Inside Its None Of One Same That The "
    "This Those True What When Where Whether Which Who Why With Yes".split()
)


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    """Ruff's D401 asks for the imperative, and passes "Of each tensor the number"."""
    wrong = []
    for name, path in PRODUCT.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node)
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if text is None or "property" in decorators:
                continue  # a property is a noun
            first = re.split(r"\W", text, maxsplit=1)[0]
            if not first or first in NO_VERBS:
                wrong.append(f"{name}.{node.name}: {text.splitlines()[0]}")
    assert not wrong


def test_docstrings_of_modules_and_classes_name_what_they_are() -> None:
    """A module or a class is a thing: its first word is no question."""
    wrong = []
    scripts = {str(path): path for path in (REPOSITORY / "scripts").rglob("*.py")}
    for name, path in (PRODUCT | scripts).items():
        tree = ast.parse(path.read_text())
        for node in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]:
            first = re.split(r"\W", ast.get_docstring(node) or "Empty", maxsplit=1)[0]
            if first in (
                "As",
                "By",
                "From",
                "How",
                "Of",
                "When",
                "Which",
                "Who",
                "With",
                "Why",
            ) or (first.startswith(("What", "Where", "Whether"))):
                wrong.append(f"{name} {getattr(node, 'name', '')}: {ast.get_docstring(node)}")
    assert not wrong
