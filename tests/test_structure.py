"""The package's structure: imports point one way, nothing comes from diffusers, and importing minidiff is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minidiff

ROOT = Path(minidiff.__file__).parent
# The packages from the bottom up. Each imports only itself and those below; request and vocabulary stand apart.
FLOORS = [
    {"checks"},
    {"vocabulary", "networks"},
    {"sampling", "guidance", "prompts", "recorded", "speed", "draw", "pictures", "safety", "image_adapter", "apart"},
    {"model"},
    {"weights", "png", "result", "request", "request_checks", "asked"},
    {"resolve", "texts", "denoise", "noise", "tries", "progress"},
    {"canvas"},
    {"run"},
    {"looking", "inversion", "editor", "start_noise"},
    {"cli", "__init__"},
    {"__main__"},
]
FILES = sorted(ROOT.rglob("*.py"))


def imports(file: Path, *, types: bool = True) -> set[str]:
    """Full names of the modules that a file imports; without `types`, not those under `if TYPE_CHECKING`."""
    package = ["minidiff", *file.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(file.read_text())
    checking = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = set() if types else {id(inner) for node in checking for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update([module] if node.module else [f"{module}.{alias.name}" for alias in node.names])
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downwards(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(file, types=False):
        top = module.split(".")[0]
        assert top != "diffusers", f"{file} imports {module}"
        if top == "minidiff" and own != "shapes":  # training may import everything
            assert room(module) == own or floor(room(module)) <= floor(own), f"{file} imports {module}"


def test_sampling_takes_nothing_but_types_from_networks() -> None:
    for file in FILES:
        if file.parent.name == "sampling":
            assert not any("networks" in module for module in imports(file, types=False)), file


def test_guidance_takes_nothing_but_attention_sites_and_types_from_networks() -> None:
    files = [file for file in FILES if file.parent.name == "guidance"]
    taken = {module for file in files for module in imports(file, types=False) if room(module) == "networks"}
    assert taken == {"minidiff.networks.attention", "minidiff.networks.sites"}


def test_only_weights_and_generate_know_what_makes_networks_fast() -> None:
    knowing = {file.relative_to(ROOT).parts[0] for file in FILES if any(room(m) == "speed" for m in imports(file))}
    assert knowing <= {"speed", "weights", "run.py", "cli"}


def test_request_and_vocabulary_import_no_other_room_by_themselves() -> None:
    code = "import sys, minidiff.request, minidiff.vocabulary\n"
    code += "print(sorted(m for m in sys.modules if m.split('.')[0] == 'minidiff'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(out) == [
        "minidiff",
        "minidiff.checks",
        "minidiff.request",
        "minidiff.request_checks",
        "minidiff.vocabulary",
    ]


def test_the_world_of_shapes_and_its_measurer_need_no_network() -> None:
    for name in ("world", "measure"):
        own = {module for module in imports(ROOT / "shapes" / f"{name}.py") if module.startswith("minidiff")}
        assert own <= {"minidiff.shapes.world"}


def test_nothing_knows_of_the_bundled_model_but_its_folder() -> None:
    for file in FILES:
        if file.parent.name != "shapes":
            assert not any(room(module) == "shapes" for module in imports(file)), file


def test_networks_need_torch_alone() -> None:
    for file in (ROOT / "networks").glob("*.py"):
        if file.name != "text.py":
            tops = {module.split(".")[0] for module in imports(file)}
            assert tops <= {"minidiff", "torch"} | set(sys.stdlib_module_names), file


def test_importing_minidiff_is_cheap() -> None:
    """Counted in modules, since seconds depend on the machine: no large ones, few beyond torch's."""
    code = "import sys, torch; before = set(sys.modules); import minidiff; print(sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    more = ast.literal_eval(out)
    assert not {"transformers", "huggingface_hub", "tqdm", "diffusers"} & {module.split(".")[0] for module in more}
    assert len(more) <= 60, more


COUNT = """
import os, sys
from minidiff.cli.main import main
root, moves = os.path.dirname(sys.modules["minidiff"].__file__), 0
def count(frame, event, _):
    global moves
    file, caller = frame.f_code.co_filename, frame.f_back and frame.f_back.f_code.co_filename
    moves += event == "call" and file.startswith(root) and caller != file and (caller or "").startswith(root)
sys.setprofile(count)
given = ["--box", "red circle=0.05,0.1,0.45,0.5", "--guidance", "inside", "--steps", "2", "--seed", "3"]
main([*sys.argv[1:], *given, "--device", "cpu"])
sys.setprofile(None)
print(moves)
"""


@pytest.mark.slow
def test_a_reader_of_a_command_changes_files_350_times(tmp_path: Path) -> None:
    """Calls from one file to another inside minidiff, of two steps with a box: what one follows in an evening."""
    command = [sys.executable, "-c", COUNT, "generate", "a red circle", "--out", "out.png"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert 200 < int(out.splitlines()[-1]) <= 350


def test_no_file_is_longer_than_400_lines() -> None:
    assert [str(file) for file in ROOT.rglob("*.py") if len(file.read_text().splitlines()) > 400] == []


def test_public_names_are_there() -> None:
    for name in minidiff.__all__:
        assert getattr(minidiff, name).__doc__, name
