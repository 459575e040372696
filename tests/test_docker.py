"""The images' files agree with one another and with the project."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
CONSTRAINTS = [
    line
    for line in (DOCKER / "cpu/constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PINS = {canonical: version for canonical, version in (line.split("==") for line in CONSTRAINTS)}


def shims() -> dict[str, dict]:
    return {
        path.parent.name: tomllib.loads(path.read_text())
        for path in DOCKER.glob("cpu/shims/*/pyproject.toml")
    }


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def compose(name: str = "compose.yaml") -> dict:
    return yaml.safe_load((DOCKER / name).read_text())


def test_constraints_are_plain_pins():
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in CONSTRAINTS)
    assert sorted(CONSTRAINTS, key=str.lower) == CONSTRAINTS


def test_constraints_cover_what_the_project_asks_for():
    extras = project()["optional-dependencies"]
    asked = [*project()["dependencies"], *extras["vllm-cpu"], *extras["dev"]]
    names = {
        re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-") for requirement in asked
    }
    assert names <= {name.lower().replace("_", "-") for name in PINS}


def test_stand_ins_install_a_name_and_no_module():
    assert set(shims()) == {"torchvision", "torchaudio", "torchcodec", "vllm"}
    for folder, shim in shims().items():
        assert shim["project"]["name"] == folder
        assert shim["tool"]["setuptools"] == {"packages": [], "py-modules": []}


def test_stand_in_for_vllm_has_the_builds_version():
    build = project()["optional-dependencies"]["vllm-cpu"][0].removeprefix("vllm-cpu==")
    assert PINS["vllm-cpu"] == build
    assert shims()["vllm"]["project"]["version"] == f"{build}+cpu"


def test_requirements_name_every_stand_in():
    lines = (DOCKER / "cpu/requirements.txt").read_text().splitlines()
    assert {line.rpartition("/")[2] for line in lines if "shims/" in line} == set(shims())


def test_dockerfile_has_both_targets_without_rights():
    text = (DOCKER / "Dockerfile").read_text()
    stages = dict(
        re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    )
    assert {"cpu", "cuda"} <= set(stages)
    for target in ("cpu", "cuda"):
        assert "USER 10001" in stages[target]  # a number: a cluster sees that it is not root
        assert 'ENTRYPOINT ["stillroom"]' in stages[target]


def test_dockerignore_lets_through_what_the_images_copy():
    let_through = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = re.findall(
        r"^COPY (?!--from)(.*) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE
    )
    assert {name for names in copied for name in names.split()} == let_through


def test_stages_share_the_store_and_nothing_else():
    services = compose()["services"]
    teacher, student = (
        {volume.removesuffix(":ro").rpartition(":")[0] for volume in services[name]["volumes"]}
        for name in ("teacher", "student")
    )
    assert teacher & student == {"store"}
    assert "runs" in student
    assert (
        services["student"]["depends_on"]["teacher"]["condition"]
        == "service_completed_successfully"
    )


def test_gpus_are_reserved_in_the_override_alone():
    assert "gpu" not in (DOCKER / "compose.yaml").read_text().lower().replace("nvidia gpus", "")
    for service in compose("compose.cuda.yaml")["services"].values():
        assert service["build"]["target"] == "cuda"
        assert service["deploy"]["resources"]["reservations"]["devices"]


@pytest.mark.parametrize(
    "files", [["compose.yaml"], ["compose.yaml", "compose.cuda.yaml"]], ids=len
)
def test_compose_accepts_the_files(files):
    if (command := compose_command()) is None:
        pytest.skip("no docker compose here")
    arguments = [argument for name in files for argument in ("-f", str(DOCKER / name))]
    done = subprocess.run(
        [*command, *arguments, "config", "--quiet"], capture_output=True, text=True, cwd=DOCKER
    )
    assert done.returncode == 0, done.stderr


def compose_command() -> list[str] | None:
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    docker = shutil.which("docker")
    if (
        docker
        and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0
    ):
        return [docker, "compose"]
    return None


def test_check_says_what_is_missing(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "id"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        [tools / "bash", DOCKER / "check.sh"],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "skipped: no Docker daemon answers, and buildah is missing" in done.stdout
