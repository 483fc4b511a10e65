"""README, docs/ and the recipes name only what exists; docs/design.md has the true imports."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from conftest import ROOT

import config
import evaluate
import prepare_data
import sample
import train

MODULES = [*sorted(ROOT.glob("*.py")), ROOT / "config" / "__init__.py"]
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in MODULES}
TREES = {name.removesuffix(".py"): ast.parse(source) for name, source in SOURCES.items()}
RECIPES = [f"config/{path.name}" for path in sorted(ROOT.glob("config/[!_]*.py"))]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/design.md", "docs/guide.md", "docs/results.md"]
DOCS = {name: (ROOT / name).read_text("utf-8") for name in PAGES + RECIPES}
CONFIGS = {"train": train.TrainConfig, "sample": sample.SampleConfig}
CONFIGS |= {"evaluate": evaluate.EvaluateConfig, "prepare_data": prepare_data.PrepareConfig}
SETTINGS = {name: {f.name for f in dataclasses.fields(kind)} for name, kind in CONFIGS.items()}
for bench in sorted(ROOT.glob("tests/bench_*.py")):  # its own settings, and those of what it runs
    text = bench.read_text("utf-8")
    if "(bench_train.BenchConfig)" in text:
        text += (ROOT / "tests" / "bench_train.py").read_text("utf-8")
    own = re.findall(r"^    (\w+): (?:int|float|bool|str) = ", text, re.M)
    SETTINGS[bench.stem] = set(own).union(*(SETTINGS[name] for name in CONFIGS))
ROW = r"^\| `([\w./]+\.py)` \| (\d+) \| .* \| ([^|]+) \|$"  # of the table of modules
OTHER_FILES = {"convert_hf_to_gguf.py", "report.md", "loss.png", "utils.py"}  # not in here


def imports_of(tree: ast.Module) -> set[str]:
    """Our modules but config that a file imports, at its top and inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names & TREES.keys()


def definitions(tree: ast.AST, prefix: str = "") -> set[str]:
    """Names of constants, functions, classes, and of their methods as Class.method."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {prefix + ast.unparse(target) for target in node.targets}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= definitions(node, f"{node.name}.")
    return names


@pytest.mark.parametrize("page", DOCS)
def test_settings_and_files_exist(page):
    """A command has settings of its script, and running text settings of any script."""
    for line in DOCS[page].replace("\\\n", " ").splitlines():
        command = re.match(r"\s*(?:\S*python|torchrun) .*?(\w+)\.py\s", line)
        scripts = [command[1]] if command and command[1] in SETTINGS else SETTINGS
        allowed = {"help", "nproc_per_node"}.union(*(SETTINGS[script] for script in scripts))
        assert set(re.findall(r"--(\w+)(?=[=`])", line)) <= allowed, line
    folders = [ROOT, ROOT / "config", (ROOT / page).parent]
    for name in re.findall(r"(?<![\w/*.-])[\w/]+\.(?:py|md|png)\b", DOCS[page]):
        is_there = any((folder / name).is_file() for folder in folders)
        assert is_there or Path(name).name in OTHER_FILES, name


def test_functions_exist():
    """Each `module.py`: `name`, ... of the table of stages in docs/design.md."""
    stages = re.findall(r"^\| [^|`]+ \| (`\w+\.py`: [^|]+) \|$", DOCS["docs/design.md"], re.M)
    assert len(stages) > 25
    for module, names in re.findall(r"`(\w+)\.py`: ((?:`[\w.]+`[,; ]*(?!:))+)", "\n".join(stages)):
        assert set(re.findall(r"[\w.]+", names)) <= definitions(TREES[module]), module


def test_modules_are_as_in_the_table():
    """Each module has a row with its imports, and no more lines than the row says. So README."""
    assert len(DOCS["README.md"].splitlines()) <= 150
    rows = re.findall(ROW, DOCS["docs/design.md"], re.M)
    assert sorted(name for name, _, _ in rows) == sorted(SOURCES)
    for name, lines, imports in rows:
        listed = set(imports.split(", ")) - {"–"}
        assert listed == imports_of(TREES[name.removesuffix(".py")]), name
        assert len(SOURCES[name].splitlines()) <= int(lines), name


def test_imports_run_one_way():
    """No module imports a script, but train sample; only scripts see a class of settings."""
    for name, tree in TREES.items():
        assert imports_of(tree) & CONFIGS.keys() <= ({"sample"} if name == "train" else set())
        if name not in CONFIGS:
            assert not re.search(r"\b(Train|Sample|Evaluate|Prepare)Config\b", ast.unparse(tree))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_name_datasets_that_can_be_made(recipe):
    settings = config.read_recipe(ROOT / recipe, train.TrainConfig)
    made = dict(re.findall(r"prepare_data\.py (\S+)(.*)", DOCS[recipe]))
    assert settings["dataset"] in {*made, *train.MADE_WHEN_MISSING}
    assert all(name in prepare_data.NAMED or "--source=" in made[name] for name in made)
