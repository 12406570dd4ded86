"""The house's rules: which way imports point, and what an import may cost."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each package with the packages of ours that it may import.
PACKAGES = {
    "rrattention": ("kernels/rrattention", set()),
    "rrvideo": ("rrvideo", {"rrattention"}),
    "rreval": ("eval/rreval", {"rrattention", "rrvideo"}),
    "rrdemo": ("demos/rrdemo", {"rrattention", "rrvideo"}),
}
SOURCES = {name: sorted((ROOT / folder).rglob("*.py")) for name, (folder, _) in PACKAGES.items()}
HEAVY = ("torch", "transformers", "triton", "gradio", "decord", "torchvision")


def imported(source: str) -> set[str]:
    """The top-level packages that a file imports anywhere in it; relative imports stay within their own."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\nfrom c.d import e\nfrom . import f\nif g:\n    import h as i\ndef j():\n    from k import l\n"

    assert imported(source) == {"a", "c", "h", "k"}


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_run_one_way(package):
    allowed = {package, *PACKAGES[package][1]}
    for path in SOURCES[package]:
        ours = imported(path.read_text()) & PACKAGES.keys()
        assert ours <= allowed, f"{path.relative_to(ROOT)} imports {', '.join(ours - allowed)}"


def test_the_rooms_that_are_looked_at_are_there():
    assert len(SOURCES["rrattention"]) > 5
    assert len(SOURCES["rrvideo"]) > 10


@pytest.mark.parametrize("folder", ["kernels", "eval", "demos", "tests"])
def test_folders_of_packages_are_no_packages_themselves(folder):
    assert not (
        ROOT / folder / "__init__.py"
    ).exists()  # transformers would take "kernels" for the package of that name


@pytest.mark.parametrize(
    "module",
    ["rrvideo", "rrvideo.cli", "rrvideo.video", "rrvideo.doctor", "rreval.cli", "rrdemo.session", "rrdemo.cli"],
)
def test_importing_is_light(module):
    script = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)

    assert done.stdout.split() == []


def modules_with_all():
    for package, (folder, _) in PACKAGES.items():
        for path in SOURCES[package]:
            if path.name != "__main__.py" and "__all__" in path.read_text():
                dotted = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
                yield dotted.removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules_with_all()))
def test_public_names_are_there_and_sorted(name):
    if name.startswith("rrattention.triton"):
        pytest.importorskip("triton")
    module = importlib.import_module(name)

    assert [each for each in module.__all__ if not hasattr(module, each)] == []
    # As ruff sorts them: constants, classes, functions.
    assert module.__all__ == sorted(module.__all__, key=lambda each: (not each.isupper(), not each[0].isupper(), each))


def test_the_package_offers_its_names_without_loading_them_first():
    import rrvideo

    assert {*rrvideo.__all__} <= {*dir(rrvideo)}
    assert rrvideo.VideoQA is importlib.import_module("rrvideo.pipeline").VideoQA
    with pytest.raises(AttributeError, match="no attribute 'VideoQ'"):
        rrvideo.VideoQ  # noqa: B018
