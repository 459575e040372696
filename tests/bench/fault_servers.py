"""The servers of the matrix, told to fail.

They are a bucket of an S3 server, and the stand-in for the Hub.
"""

import ctypes
import json
import os
import shutil
import signal
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hub
from forked import fork

FROM_REQUEST = {"s3": 20, "hub": 6}
"""Of the command: this one, and all after it, are refused."""
PAUSE = 0.2
MANY = 10**9


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own on the S3 server at a URL."""

    url: str
    name: str

    def environment(self) -> dict[str, str]:
        """The environment that a user sets, but with a driver that gives up sooner."""
        settings = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "MAX_ATTEMPTS": "2"}
        settings |= {"ENDPOINT_URL": self.url, "DEFAULT_REGION": "us-east-1"}
        return {f"AWS_{name}": value for name, value in settings.items()}

    def take(self, store: Path) -> str:
        """Bring a store there; its new address."""
        _ask(f"{self.url}/{self.name}", "PUT")
        for path in store.rglob("*"):
            name = path.relative_to(store).as_posix()
            if path.is_file() and not name.startswith("cache/"):
                _ask(f"{self.url}/{self.name}/store/{name}", "PUT", path.read_bytes())
        shutil.rmtree(store, ignore_errors=True)
        return f"s3://{self.name}/store"

    def fail(self, kind: str) -> None:
        """From some request on it is `503`; from the first on, `slow`."""
        number = 1 if kind == "slow" else FROM_REQUEST["s3"]
        methods = ["GET", "HEAD", "PUT", "POST", "DELETE"]
        told = {"kind": kind, "number": number, "times": MANY, "methods": methods}
        _ask(f"{self.url}/_log", "POST")
        _ask(f"{self.url}/_fault", "POST", json.dumps(told).encode())

    def forgive(self) -> int:
        """Be well again; how many requests failed or were slow."""
        none = {"kind": "", "number": 1, "times": 0}
        _ask(f"{self.url}/_fault", "POST", json.dumps(none).encode())
        log = json.loads(_ask(f"{self.url}/_log", "POST"))
        return sum(line.endswith((" 503", " slow")) for line in log)


@dataclass(frozen=True)
class HubBeside:
    """The stand-in for the Hub, in a process of its own."""

    url: str
    pid: int

    @staticmethod
    def start() -> "HubBeside":
        """It ends with this process."""
        ours, theirs = os.pipe()
        bench = os.getpid()

        def serve() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            with hub.serve() as served:
                os.write(theirs, served.url.encode())
                while os.getppid() == bench:
                    time.sleep(0.1)

        pid = fork(serve)
        return HubBeside(os.read(ours, 100).decode(), pid)

    def environment(self) -> dict[str, str]:
        """How a command finds it; `use` reads that."""
        return {"HF_ENDPOINT": self.url}

    def fail(self, kind: str) -> None:
        """From some request on it is `503`; from the first on, `slow`."""
        self._tell(None if kind == "slow" else FROM_REQUEST["hub"], PAUSE if kind == "slow" else 0)

    def forgive(self) -> int:
        """Be well again; how many requests came, if enough did for one to fail."""
        asked: int = self._tell(None, 0)["requests"]
        return asked if asked >= FROM_REQUEST["hub"] else 0

    def published(self) -> dict[str, str]:
        """Hashes of the files that are there."""
        found: dict[str, str] = json.loads(_ask(f"{self.url}/_hashes", "GET"))
        return found

    def _tell(self, busy_from: int | None, pause: float) -> Any:
        told = json.dumps({"busy_from": busy_from, "pause": pause}).encode()
        return json.loads(_ask(f"{self.url}/_told", "POST", told))


def use_hub(url: str, cache: Path) -> None:
    """Use the stand-in in a process that has read the library's settings already."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    settings = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
    }
    for name, value in settings.items():
        setattr(constants, name, value)


def _ask(url: str, method: str, data: bytes | None = None) -> bytes:
    # Of what urllib would call a form, the server waits for more than there is.
    kind = {"Content-Type": "application/octet-stream"}
    asked = urllib.request.Request(url, data, kind, method=method)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        content: bytes = answer.read()
        return content
