"""Rules of the repository that a reader relies on."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "qlora_dist": ROOT / "qlora_dist",
    "qlora_launch": ROOT / "launch" / "qlora_launch",
    "qlora_slurm": ROOT / "slurm" / "qlora_slurm",
}
MODULES = [path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))]
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "datasets"}


def imports(path, *, top_level):
    """Top names of what a module imports; with ``top_level``, of what importing it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if not top_level else _eager(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def _eager(node):
    for child in ast.iter_child_nodes(node):
        type_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not isinstance(child, ast.FunctionDef) and not type_only:
            yield child
            yield from _eager(child)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = next(name for name, folder in PACKAGES.items() if folder in path.parents)
    others = imports(path, top_level=False) & set(PACKAGES)
    assert others <= {package, "qlora_dist"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_is_imported_in_train_only(path):
    if "train" not in path.relative_to(ROOT).parts[1:-1]:
        assert not imports(path, top_level=True) & HEAVY


@pytest.mark.parametrize("name", ["launch", "slurm", "configs", "tests"])
def test_folders_with_common_names_are_no_packages(name):
    assert not (ROOT / name / "__init__.py").exists()


def test_no_module_shadows_a_dependency_or_the_standard_library():
    for path in MODULES:
        assert path.stem not in HEAVY | set(sys.stdlib_module_names), path


def test_every_link_in_the_documents_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(pages) >= 6
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_version_is_the_changelogs():
    from qlora_dist import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
