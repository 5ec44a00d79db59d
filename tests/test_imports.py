"""Imports point downward only, and the command line starts without PyTorch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "genrec"
BELOW = {  # room → the rooms it may import, itself included
    "interfaces": set(),
    "kernels": {"kernels"},
    "models": {"models", "kernels", "interfaces"},
    "data": {"data", "interfaces"},
    "generation": {"generation", "models", "data", "kernels", "interfaces"},
    "pages": {"pages"},
    "evaluation": {"evaluation", "pages", "generation", "models", "data", "kernels", "interfaces"},
    "training": {"training", "evaluation", "pages", "generation", "models", "data", "kernels", "interfaces"},
    "export": {"export", "generation", "models", "data", "kernels", "interfaces"},
    "serving": {"serving", "export", "data"},
    "demo_ui": {"demo_ui", "pages", "generation", "models", "data", "interfaces"},
    "profiling": {"profiling", "data", "kernels"},
    "benchmarks": {"benchmarks", "pages", "data"},
    "__main__": {"cli"},
}
BELOW["cli"] = {"cli", *BELOW} - {"__main__"}  # everything
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Every room of genrec that a module imports, anywhere in it; "" for the package itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: a relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "genrec" else [node.module]
            )
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "genrec":
                yield rest.partition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downward(path):
    place = path.relative_to(PACKAGE).parts
    room = place[0].removesuffix(".py")
    if room == "__init__":
        assert not list(imported(path))
        return
    assert room in BELOW, f"{room} is a new room: say here what it may import"
    above = {name for name in imported(path) if name in BELOW} - BELOW[room]
    assert not above, f"{room} imports {sorted(above)}"
    if room != "cli":
        assert "" not in imported(path), "the package itself is for its version alone"


def test_the_rule_sees_every_form(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        "import genrec.cli.train\nfrom genrec import kernels\nif 1:\n    from genrec.data.files import x\n"
        "def f():\n    import genrec.models as m, os\nimport numpy\nimport genrec\n"
    )
    assert sorted(imported(module)) == ["", "cli", "data", "kernels", "models"]


def test_usage_is_printed_without_torch():
    """genrec --help and a mistyped command answer in milliseconds, and where torch is not installed at all."""
    code = (
        "import sys; from genrec.cli import main; code = main(['--help']), main(['nonsense']);"
        "print(code, sorted({'torch', 'numpy', 'duckdb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "(0, 2) []"


def test_a_missing_torch_is_one_sentence():
    code = (
        "import sys; sys.modules['torch'] = None; from genrec.cli import main\n"
        "sys.exit(main(['train', '--features', 'f', '--semantic_ids', 's', '--out', 'o']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("genrec train: error: PyTorch is not installed; pip install")
    assert done.stderr.count("\n") == 1
