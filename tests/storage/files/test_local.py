"""LocalFiles: exactly one winner per name, whole files only, and errors that say what to do."""

import errno
import hashlib
import os
import subprocess
import sys

import pytest

from stillroom.storage.errors import StillroomError, UsageError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.files.opening import open_files

RACER = """
import sys
from stillroom.storage.files.local import LocalFiles
root, me = sys.argv[1:]
files = LocalFiles(root)
print("ready", flush=True)
sys.stdin.readline()
print(*(i for i in range(100) if files.put_if_absent(f"race/{i}", f"{me} {i}".encode() * 50)))
"""


def test_racing_processes_have_one_winner_per_name(tmp_path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), str(me)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in range(3)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [set(map(int, racer.communicate()[0].split())) for racer in racers]

    assert sorted(name for names in won for name in names) == list(range(100))
    files = LocalFiles(tmp_path)
    assert len(files.names("race")) == 100
    for me, names in enumerate(won):
        for name in names:
            assert files.read(f"race/{name}") == f"{me} {name}".encode() * 50
    assert not list(tmp_path.rglob(".tmp-*"))


def test_put_if_absent_keeps_the_first(tmp_path):
    files = LocalFiles(tmp_path)
    assert files.put_if_absent("a/b/c", b"first")
    assert not files.put_if_absent("a/b/c", b"second")
    assert files.read("a/b/c") == b"first"
    assert files.names("a/b") == ["c"]
    assert files.names("a") == []
    assert files.names("nowhere") == []


def test_a_link_that_worked_but_said_it_failed_is_a_win(tmp_path):
    class Lost(LocalFiles):
        def _link(self, temp, final):
            super()._link(temp, final)
            raise FileExistsError(errno.EEXIST, "answer lost", str(final))

    assert Lost(tmp_path).put_if_absent("a", b"x")
    assert (
        Lost(tmp_path).put_content("d", lambda path: path.write_bytes(b"x"), suffix="").bytes == 1
    )


def test_put_content_is_named_by_its_bytes(tmp_path):
    files = LocalFiles(tmp_path)
    sha256 = hashlib.sha256(b"content").hexdigest()
    content = files.put_content("data", lambda path: path.write_bytes(b"content"), suffix=".bin")
    assert content.name == f"data/{sha256[:2]}/{sha256[:32]}.bin"
    assert (content.sha256, content.bytes) == (sha256, 7)
    assert (
        files.put_content("data", lambda path: path.write_bytes(b"content"), suffix=".bin")
        == content
    )


def test_put_content_heals_a_damaged_file_of_that_name(tmp_path):
    files = LocalFiles(tmp_path)
    content = files.put_content("data", lambda path: path.write_bytes(b"content"), suffix="")
    files.path(content.name).write_bytes(b"damaged")
    files.put_content("data", lambda path: path.write_bytes(b"content"), suffix="")
    assert files.read(content.name) == b"content"


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full. Free space"),
        (errno.EACCES, "Permission denied; give this user"),
        (errno.EROFS, "read-only"),
        (errno.EPERM, "not permitted; a filesystem that takes no new files or no hard links"),
    ],
)
@pytest.mark.parametrize("step", ["_write", "_sync_file", "_link", "_sync_folder"])
def test_a_failed_step_names_file_and_remedy_and_leaves_no_temporary(
    tmp_path, monkeypatch, number, says, step
):
    def fail(self, path, *rest):
        raise OSError(number, os.strerror(number), str(path))

    files = LocalFiles(tmp_path)
    files.put_if_absent("folder/there", b"x")
    monkeypatch.setattr(LocalFiles, step, fail)
    with pytest.raises(StillroomError, match=says) as caught:
        files.put_if_absent("folder/name", b"x")
    assert str(tmp_path / "folder") in str(caught.value)
    with pytest.raises(StillroomError, match=says):
        files.put_content("folder", lambda path: path.write_bytes(b"x"), suffix="")
    assert caught.value.exit_code == 1
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    """In /proc nobody can: it says that the new name does not exist."""
    for write in (
        lambda files: files.put_if_absent("folder/name", b"x"),
        lambda files: files.put_content("folder", lambda path: path.write_bytes(b"x"), suffix=""),
        lambda files: files.replace("name", b"x"),
    ):
        with pytest.raises(
            StillroomError, match=r"^/proc/nowhere: no folder can be made there\. Choose another"
        ):
            write(LocalFiles("/proc/nowhere"))


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "folders do not sync here")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert LocalFiles(tmp_path).put_if_absent("a/b", b"x")


def test_replace_changes_the_content(tmp_path):
    files = LocalFiles(tmp_path)
    for data in (b"old", b"new"):
        files.replace("a/state", data)
        assert files.read("a/state") == data
    assert not list(tmp_path.rglob(".tmp-*"))


def test_point_moves_a_link(tmp_path):
    files = LocalFiles(tmp_path)
    for target in ("a", "b"):
        (tmp_path / target).mkdir()
        files.point("latest", target)
        assert (tmp_path / "latest").resolve() == tmp_path / target
    assert not list(tmp_path.rglob(".tmp-*"))


def test_what_is_there_is_found_by_name(tmp_path):
    files = open_files(str(tmp_path / "new"))
    assert files.empty()
    assert files.read_many(["a"]) == {}
    files.put_if_absent(".only-temporary", b"x")
    assert files.empty()
    files.put_if_absent("folder/a", b"1")
    assert not files.empty()
    assert files.read_many(["folder/b", "folder/a"]) == {"folder/a": b"1"}
    assert files.local("folder/a").read_bytes() == b"1"
    with pytest.raises(FileNotFoundError):
        files.local("folder/b")
    files.prove_exclusive()
    assert [name for name, *_ in files.walk()] == [".only-temporary", "folder/a"]


@pytest.mark.parametrize("address", ["{file}", "{file}/store", "s3://"])
def test_what_can_be_no_folder_is_refused_before_anything_is_made(tmp_path, address):
    file = tmp_path / "recipe.yaml"
    file.write_text("run: {}")
    with pytest.raises(UsageError, match=r"file, expected a folder|names no place"):
        open_files(address.format(file=file)).empty()
    assert list(tmp_path.iterdir()) == [file]
