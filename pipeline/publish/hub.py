"""Sending a published folder to the Hub: data first, the card that points at it last, then a tag.

Every step can be interrupted and done again: what is there with the same bytes is not sent again.
Retries, chunked transfers and tokens are the library's business.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...storage.errors import StillroomError, UsageError
from ...storage.published.manifest import CARD, MANIFEST, current_version

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from .export import Exported

BATCH = 50
"""Files of one commit: the Hub's own advice is 50 to 100."""
_KIND = "dataset"


def upload(
    exported: "Exported",
    repo: str,
    *,
    say: Callable[[str], None],
    private: bool = False,
    api: "HfApi | None" = None,
) -> str:
    """Bring a version to the Hub and let the card there point at it.

    Args:
        exported: The folder, its manifest and card.
        repo: USER/NAME; made where it is not there.
        say: Told what is being done.
        private: Make it private; refuse one that is there and public.
        api: The Hub; None: as the environment says.

    Returns:
        The dataset's address.

    Raises:
        UsageError: the repository is somebody's, or the Hub does not take the card.
        StillroomError: the Hub refused or did not answer; the same command goes on.
    """
    from huggingface_hub import HfApi

    hub = _Hub(api or HfApi(library_name="stillroom"), repo, exported)
    with _explained(hub):
        url = hub.open(private=private)
        hub.send_data(say)
        hub.point(say)
    return url


class _Hub:
    def __init__(self, api: "HfApi", repo: str, exported: "Exported") -> None:
        self._api, self.repo, self._exported = api, repo, exported
        self.seen: bool | None = None
        """Whether readers see a version; None: the Hub did not say yet."""
        self._version = exported.manifest.version
        names = [*(file.name for file in exported.manifest.files), MANIFEST]
        self._names = [f"{self._version}/{name}" for name in names]

    def open(self, *, private: bool) -> str:
        """Make the repository if need be.

        A repository that is not ours is refused, and so is a card that the Hub would refuse.
        """
        from huggingface_hub import DatasetCard

        try:
            DatasetCard(self._exported.card).validate()  # before anything is there
        except ValueError as error:
            raise UsageError(f"{self.repo}: the Hub does not take the card: {error}") from error
        url = self._api.create_repo(
            self.repo, repo_type=_KIND, private=private or None, exist_ok=True
        )
        if private and not self._api.repo_info(self.repo, repo_type=_KIND).private:
            raise UsageError(
                f"{self.repo}: is public already. Make it private on the Hub first, or leave "
                "--private out."
            )
        card = self._card()
        if card is not None and current_version(card) is None and DatasetCard(card).text.strip():
            raise UsageError(
                f"{self.repo}: has a {CARD} that no export wrote. Name another repository."
            )
        self.seen = card is not None and current_version(card) is not None
        return str(url)

    def send_data(self, say: Callable[[str], None]) -> None:
        """Send what is not there yet, some files at a time; each commit is one step for readers."""
        from huggingface_hub import CommitOperationAdd

        missing = self._missing()
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            say(
                f"sending files {start + 1} to {start + len(batch)} of {len(missing)} to "
                f"{self.repo}"
            )
            self._api.create_commit(
                self.repo,
                [CommitOperationAdd(name, str(self._path(name))) for name in batch],
                commit_message=f"{self._version}: data",
                repo_type=_KIND,
            )

    def point(self, say: Callable[[str], None]) -> None:
        """Let the card point at the version, if all of it is there, and give that state a name."""
        from huggingface_hub import CommitOperationAdd

        head = self._api.repo_info(self.repo, repo_type=_KIND).sha
        if missing := self._missing():
            raise StillroomError(
                f"{self.repo}: {missing[0]} is not there as it was sent. Run the same command "
                "again."
            )
        if self._card() != self._exported.card:
            say(f"pointing the card at {self._version}")
            head = self._api.create_commit(
                self.repo,
                [CommitOperationAdd(CARD, self._exported.card.encode())],
                commit_message=f"{self._version}: the card points at it",
                repo_type=_KIND,
                parent_commit=head,  # refused if somebody else committed since
            ).oid
        self.seen = True
        self._api.create_tag(
            self.repo, tag=self._version, revision=head, repo_type=_KIND, exist_ok=True
        )

    def _path(self, name: str) -> Path:
        return self._exported.folder / name

    def _missing(self) -> list[str]:
        """Names of files that are not there, or with other bytes; the manifest last."""
        hashes = {
            f"{self._version}/{file.name}": file.sha256 for file in self._exported.manifest.files
        }
        there = set()
        for start in range(0, len(self._names), 1000):
            part = self._names[start : start + 1000]
            for info in self._api.get_paths_info(self.repo, part, repo_type=_KIND):
                if _same(info, self._path(info.path), hashes.get(info.path)):
                    there.add(info.path)
        return [name for name in self._names if name not in there]

    def _card(self) -> str | None:
        """The card that is there now."""
        if not self._api.get_paths_info(self.repo, [CARD], repo_type=_KIND):
            return None
        return Path(self._api.hf_hub_download(self.repo, CARD, repo_type=_KIND)).read_text()


def _same(info: Any, path: Path, sha256: str | None) -> bool:
    """Whether a file of the Hub has these bytes.

    The Hub names large files by their sha256, small ones as git does.
    """
    if info.lfs is not None and sha256 is not None:
        return bool(info.lfs.sha256 == sha256)
    content = path.read_bytes()
    if info.lfs is not None:
        return bool(info.lfs.sha256 == hashlib.sha256(content).hexdigest())
    return bool(info.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


@contextmanager
def _explained(hub: _Hub) -> Iterator[None]:
    try:
        yield
    except StillroomError:
        raise
    except Exception as error:  # the library and what it is built on raise what they like
        there = {
            True: "readers of the Hub see a whole version",
            False: "nothing is published yet",
            None: (
                "nothing of it is published yet; what readers of the Hub saw before, if anything, "
                "they still see"
            ),
        }[hub.seen]
        raise StillroomError(
            f"{hub.repo}: {type(error).__name__}: {error}\nThe dataset is complete on this "
            f"machine, and {there}. Log in with `hf auth login` if that is it; run the same "
            "command to go on."
        ) from error
