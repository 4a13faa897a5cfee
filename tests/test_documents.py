"""The documents match the repository: lines are short, links resolve, and named files and commands exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from resplit.cli import app
from resplit.config import ClusterConfig
from tests.support.cluster_file import keys_of, sections

ROOT = Path(__file__).parents[1]
WIDTH = 100
CLUSTER_FILE = ROOT / "docs/cluster-file.md"
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "data/**/*.md", ".github/**/*.md") for path in ROOT.glob(pattern)
)
CODE_FOLDERS = ("src", "tasks", "flows", "benchmarks", "scripts", "tests", "examples")
GENERATED = ("data/generated", "reports/", "mutants/")  # written by commands, so absent from a fresh checkout
STATE_FOLDERS = {"keys/", "models/", "registry/", "quarantine/", "mlflow/", "prefect/", "log/"}

FENCE = re.compile(r"^\s*```")
CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
URL = re.compile(r"<?https?://\S+")
ROOTED = re.compile(
    r"^(?:src|tests|docs|tasks|flows|benchmarks|scripts|examples|data/clusters|data/scenarios|data/traces)/[\w./*-]+$"
)
PYTHON_FILE = re.compile(r"^[\w./]+\.(?:py|pyi|proto)$")
FOLDER = re.compile(r"^(?:[a-z_]+/)+$")
DOTTED = re.compile(r"^resplit(?:\.\w+)+$")
MAKE = re.compile(r"(?:^|\s)make ([a-z][a-z-]*)")
RUN_MODULE = re.compile(r"python -m ((?:flows|tasks|benchmarks)(?:\.\w+)*)")
METRIC = re.compile(r"^(resplit_\w+)$")
SUBCOMMAND = re.compile(r"(?:^|\s)resplit ([a-z]+)(?:\s|$)")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@each_document
def test_lines_are_at_most_a_hundred_characters_long(document: Path) -> None:
    lines = [*prose(document), *fenced(document)]
    long = [line for line in lines if len(without_targets(line)) > WIDTH]
    assert not long, "\n".join(long)


@each_document
def test_relative_links_and_their_anchors_resolve(document: Path) -> None:
    targets = [target for line in prose(document, tables=True) for target in LINK.findall(line)]
    broken = [target for target in targets if "://" not in target and not resolves(document, target)]
    assert not broken, "\n".join(broken)


def test_links_of_the_site_stay_within_it() -> None:
    outside = [
        f"{document.name}: {target}"
        for document in ROOT.glob("docs/**/*.md")
        for line in prose(document, tables=True)
        for target in LINK.findall(line)
        if "://" not in target and ROOT / "docs" not in (document.parent / target).resolve().parents
    ]
    assert not outside, "name a file outside of docs/ in code instead:\n" + "\n".join(outside)


def test_every_document_of_the_site_is_in_its_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text()
    missing = [path.name for path in ROOT.glob("docs/*.md") if f" {path.name}\n" not in contents]
    assert not missing, f"add to `nav` in mkdocs.yml: {missing}"


@each_document
def test_named_files_and_modules_exist(document: Path) -> None:
    missing = [name for name in spans(document) if not exists(name)]
    assert not missing, "\n".join(missing)


@each_document
def test_named_commands_and_metrics_exist(document: Path) -> None:
    known = {
        MAKE: set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)),
        SUBCOMMAND: {each.name or each.callback.__name__ for each in app.registered_commands if each.callback},
        RUN_MODULE: {name.removesuffix("/__main__").replace("/", ".") for name in map(without_suffix, source_names())},
        METRIC: set(re.findall(r'"(resplit_\w+)"', (ROOT / "src/resplit/gateway/openai/prometheus.py").read_text())),
    }
    code = [*spans(document), *code_lines(document)]
    unknown = [name for kind in known for text in code for name in kind.findall(text) if name not in known[kind]]
    assert not unknown, "\n".join(unknown)


def test_every_name_of_the_glossary_is_used_in_the_code() -> None:
    words = set(re.findall(r"\w+", code_of("src", "tasks", "flows")))
    names = [name for row in table_rows(ROOT / "docs/glossary.md") for name in CODE_SPAN.findall(row[1])]
    unused = [name for name in names if not set(re.findall(r"\w+", name)) <= words]
    assert names
    assert not unused, "\n".join(unused)


def test_every_message_of_the_troubleshooting_table_is_in_the_code() -> None:
    texts = literals("src", "tasks", "flows")
    table = (ROOT / "docs/operations.md").read_text().partition("## Troubleshooting")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    messages = [span for cell in cells for span in CODE_SPAN.findall(cell) if " " in span]
    parts = [part.strip(" :") for message in messages for part in re.split(r"\.\.\.|\b[A-Z]+\b", message)]
    unknown = [part for part in parts if part not in texts]
    assert messages
    assert not unknown, "\n".join(unknown)


def prose(document: Path, tables: bool = False) -> Iterator[str]:
    """The lines of a document outside fenced and indented code; with `tables`, those of tables too."""
    fenced = False
    for line in document.read_text().splitlines():
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced and not line.startswith("    ") and (tables or not line.startswith("|")):
            yield line


def fenced(document: Path) -> Iterator[str]:
    """The lines inside fenced code."""
    inside = False
    for line in document.read_text().splitlines():
        if FENCE.match(line):
            inside = not inside
        elif inside:
            yield line


def code_lines(document: Path) -> Iterator[str]:
    """The lines inside fenced code, without the comments of a shell."""
    return (line.split("#")[0] for line in fenced(document))


def spans(document: Path) -> list[str]:
    """The contents of all inline code, tables included."""
    return CODE_SPAN.findall("\n".join(prose(document, tables=True)))


def without_targets(line: str) -> str:
    """A line without the parts that cannot be wrapped: the targets of links, and addresses."""
    return URL.sub("", LINK.sub("]", line))


def table_rows(document: Path) -> list[list[str]]:
    """The cells of every table row of a document, headers and rules left out."""
    rows = [line.strip("|").split("|") for line in document.read_text().splitlines() if line.startswith("|")]
    rules = {index for index, row in enumerate(rows) if all(set(cell.strip()) <= {"-", ":"} for cell in row)}
    return [row for index, row in enumerate(rows) if index not in rules and index + 1 not in rules]


def resolves(document: Path, target: str) -> bool:
    """Whether a relative link leads to a file, and its anchor to a heading there."""
    name, _, anchor = target.partition("#")
    path = (document.parent / name).resolve() if name else document
    if name.startswith(GENERATED):
        return True
    return path.exists() and (not anchor or anchor in anchors(path))


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = [line.lstrip("#") for line in prose(document) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def exists(name: str) -> bool:
    """Whether inline code that looks like a file, a folder or a module names one; True for any other text."""
    if name.startswith(GENERATED) or name in STATE_FOLDERS:
        return True
    if ROOTED.match(name):
        return any(ROOT.glob(name.rstrip("/")))
    if PYTHON_FILE.match(name):
        return any(f"/{path}".endswith(f"/{name}") for path in source_names())
    if FOLDER.match(name):
        return any(f"/{path}/".endswith(f"/{name}") for path in source_folders())
    return is_public_name(name) if DOTTED.match(name) else True


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def source_files(*folders: str) -> Iterator[Path]:
    """Every source file below these folders of the checkout."""
    for folder in folders:
        yield from (path for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".pyi", ".proto"))


def source_names() -> Iterator[str]:
    """Every source file, relative to the checkout."""
    return map(relative, source_files(*CODE_FOLDERS))


def code_of(*folders: str) -> str:
    """The text of every source file below these folders."""
    return "\n".join(path.read_text() for path in source_files(*folders))


def literals(*folders: str) -> str:
    """Every string literal of the code below these folders, except docstrings, on a line of its own."""
    nodes = [
        node
        for file in source_files(*folders)
        if file.suffix == ".py"
        for node in ast.walk(ast.parse(file.read_text()))
    ]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return "\n".join(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    )


def without_suffix(name: str) -> str:
    return name.rsplit(".", 1)[0]


def source_folders() -> set[str]:
    """Every folder of the checkout, relative to it, that holds sources or documents."""
    return {str(parent) for name in (*source_names(), *map(relative, DOCUMENTS)) for parent in Path(name).parents}


def is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()


def is_public_name(name: str) -> bool:
    """Whether `resplit.a.b` is a module, or the module `resplit.a` contains the name `b`."""
    path = ROOT / "src" / name.replace(".", "/")
    if is_module(path):
        return True
    parent = path.parent / "__init__.py" if path.parent.is_dir() else path.parent.with_suffix(".py")
    return parent.is_file() and re.search(rf"\b{path.name}\b", parent.read_text()) is not None


def test_the_reference_of_the_cluster_file_has_every_key_with_its_default_and_a_valid_example() -> None:
    rows = {row[0].strip(" `"): [cell.strip(" `") for cell in row[1:3]] for row in table_rows(CLUSTER_FILE)}
    documented = {
        key.replace("KIND", kind): cells for key, cells in rows.items() for kind in ("embed", "layer", "head")
    }
    fields = dict(keys_of(ClusterConfig))
    wrong = [key for key, cells in documented.items() if key in fields and not describes(cells, fields[key])]
    assert documented.keys() - fields.keys() == set()
    assert {key for key, field in fields.items() if not sections(field)} - documented.keys() == set()
    assert not wrong, "\n".join(wrong)


def test_the_example_of_the_cluster_file_is_valid() -> None:
    example = "\n".join(code_lines(CLUSTER_FILE))
    assert ClusterConfig.model_validate(yaml.safe_load(example)).source == "hub"


def describes(cells: list[str], field: FieldInfo) -> bool:
    """Whether default and example of a row are those of the schema: equal, and valid."""
    default, example = cells
    value = TypeAdapter(Annotated[field.annotation, field])
    value.validate_python(yaml.safe_load(example))
    if default in ("required", "-"):
        return field.is_required() if default == "required" else field.default is None
    return value.validate_python(yaml.safe_load(default)) == field.default
