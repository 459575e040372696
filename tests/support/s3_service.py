"""Fixtures of an S3 server.

`from s3_service import port, s3` in a conftest brings them to its tests.
"""

import importlib.util
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stillroom.storage.files import objects as object_files

S3_SERVER = Path(__file__).with_name("s3_server.py")


@dataclass(frozen=True)
class Server:
    """The server, and a bucket of its own for each test."""

    port: int
    bucket: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def root(self) -> str:
        return f"s3://{self.bucket}/a/store"

    def fault(self, kind: str, number: int = 1, times: int = 1) -> None:
        self._tell("_fault", "POST", {"kind": kind, "number": number, "times": times})

    def log(self) -> list[str]:
        """Requests since the last time, as `METHOD /bucket/key status`."""
        return json.loads(self._tell("_log", "POST"))

    def make_bucket(self) -> None:
        self._tell(self.bucket, "PUT")

    @staticmethod
    def reconnect() -> None:
        """The driver reads the environment again."""
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()

    def _tell(self, path: str, method: str, content: Any = None) -> bytes:
        data = json.dumps(content).encode() if content else b""
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/{path}", data, method=method)
        ) as answer:
            return answer.read()


@pytest.fixture(scope="session")
def port() -> Iterator[int]:
    if missing := [
        name for name in ("moto", "s3fs", "flask") if importlib.util.find_spec(name) is None
    ]:
        pytest.skip(f"not installed: {', '.join(missing)} (extra `dev`)")
    process = subprocess.Popen(
        [sys.executable, S3_SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    yield int(process.stdout.readline())
    process.kill()
    process.communicate()


@pytest.fixture
def s3(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The environment as a user sets it, but the driver tries once.

    So our own care is what is tested.
    """
    server = Server(port, f"bucket-{abs(hash(str(tmp_path)))}")
    settings = {
        "ENDPOINT_URL": server.url,
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "MAX_ATTEMPTS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(object_files, "CREATE_PAUSES", (0.0, 0.01, 0.02))
    server.reconnect()
    server.fault("")
    server.make_bucket()
    server.log()
    return server
