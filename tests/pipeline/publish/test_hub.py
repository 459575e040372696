"""Publishing to a stand-in for the Hub's HTTP interface, interrupted at every request.

The stand-in is `tests/support/hub.py`.

Real requests of huggingface_hub over a socket, answered by a stand-in: that the Hub itself answers
so is not shown. Transfers go by LFS; the xet protocol, which the library prefers where the Hub
offers it, is left out.
"""

import copy
import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest
from hub import Hub, serve
from published import make_store, snapshots_of

from stillroom.pipeline.publish.export import PublishRequest, export
from stillroom.pipeline.publish.hub import upload
from stillroom.pipeline.publish.publish import publish
from stillroom.storage.errors import StillroomError, UsageError
from stillroom.storage.published.choice import Choice
from stillroom.storage.published.manifest import current_version, read_manifest

REPO = "user/name"


def silent(text: str) -> None:
    """Where nobody listens."""


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """The same dataset in two versions, exported."""
    root = tmp_path_factory.mktemp("published")
    store = make_store(root / "store")
    snapshots_of(store)
    asked = {
        "store": str(store.root),
        "license": "mit",
        "model_licenses": ("mit",),
        "source_licenses": ("mit",),
    }
    choices = {"old": Choice(), "new": Choice(min_k=3)}
    return {
        name: export(
            PublishRequest(**asked, choice=choice), root / name, say=silent, strict=True, repo=REPO
        )
        for name, choice in choices.items()
    }


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with serve() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
        hub.after_each = what_readers_see
        yield hub


def what_readers_see(hub: Hub) -> None:
    """What readers see at any moment: no card, or one whose version is whole.

    Every file is there as its manifest says.
    """
    card = hub.files.get("README.md")
    if card is None:
        return
    version = current_version(card.decode())
    manifest = hub.files.get(f"{version}/MANIFEST.json")
    if manifest is None:
        hub.wrong.append(f"{version} has no manifest")
        return
    for file in json.loads(manifest)["files"]:
        content = hub.files.get(f"{version}/{file['name']}", b"")
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            hub.wrong.append(f"{version}/{file['name']}")


def send(hub: Hub, exported) -> str:
    from huggingface_hub import HfApi

    hub.requests.clear()
    return upload(exported, REPO, say=silent, api=HfApi(endpoint=hub.url, token="hf_nobody"))


def test_data_come_first_and_the_card_last_in_a_commit_of_its_own(hub, versions):
    url = send(hub, versions["old"])
    version = versions["old"].manifest.version
    assert url.endswith(REPO)
    assert hub.titles == ["initial commit", f"{version}: data", f"{version}: the card points at it"]
    assert "README.md" not in hub.commits[1]
    assert set(hub.commits[2]) - set(hub.commits[1]) == {"README.md"}
    assert hub.tags == {version: hub.head}
    assert current_version(hub.files["README.md"].decode()) == version
    for name, content in hub.files.items():
        assert content == (versions["old"].folder / name).read_bytes()


def test_what_is_there_is_not_sent_again(hub, versions):
    send(hub, versions["old"])
    sent, commits = hub.sent, list(hub.titles)
    send(hub, versions["old"])
    assert (hub.sent, hub.titles) == (sent, commits)
    hub.commits.append(
        {**hub.files, next(n for n in hub.files if n.endswith("PROVENANCE.json")): b"somebody's"}
    )
    hub.titles.append("somebody's")
    send(hub, versions["old"])
    assert hub.sent == sent
    assert hub.files == hub.commits[2]


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_at_every_request_and_resumed_no_reader_sees_a_mixed_version(
    hub, versions, when
):
    """`before`: the request does nothing; `after`: it does what it says, and the answer is lost."""
    send(hub, versions["old"])
    start = copy.deepcopy(
        {name: getattr(hub, name) for name in ("commits", "titles", "tags", "stored")}
    )
    send(hub, versions["new"])
    asked, new = len(hub.requests), versions["new"].manifest.version
    assert asked > 10
    finished, survived = hub.files, 0
    for number in range(1, asked + 1):
        for name, value in copy.deepcopy(start).items():
            setattr(hub, name, value)
        hub.fault = (number, when)
        with suppress(StillroomError):  # which says how to go on
            send(hub, versions["new"])
            assert hub.files == finished  # the library found a way round
            survived += 1
        hub.fault = None
        send(hub, versions["new"])
        assert hub.files == finished
        assert hub.tags[new] == hub.head
    assert hub.wrong == []
    assert survived <= 4, "most interruptions end the command"


def test_what_is_said_of_readers_is_what_they_see(hub, versions):
    """Interrupted in the middle, of a first version and of a second one."""
    hub.fault = (8, "before")
    with pytest.raises(StillroomError, match=r"and nothing is published yet\. Log in"):
        send(hub, versions["old"])
    hub.fault = None
    send(hub, versions["old"])
    told = []
    for number in range(1, 12):
        hub.fault = (number, "before")
        try:
            send(hub, versions["new"])
        except StillroomError as error:
            told.append(str(error))
    assert "what readers of the Hub saw before, if anything, they still see" in told[0], (
        "nothing was asked yet"
    )
    assert "readers of the Hub see a whole version" in told[-1]
    assert not any("and nothing is published yet. " in text for text in told)


def test_a_half_made_version_is_found_by_the_check_of_these_tests(hub, versions):
    send(hub, versions["old"])
    files = {
        name: content for name, content in hub.files.items() if "soft_targets/train" not in name
    }
    hub.commits.append(files)
    what_readers_see(hub)
    assert len(hub.wrong) == 1
    assert "soft_targets/train" in hub.wrong[0]


def test_a_commit_of_somebody_else_in_between_stops_the_card(hub, versions):
    """Its parent is the commit that was looked at."""

    def intrude(hub: Hub) -> None:
        if hub.requests[-1].startswith("GET /api/datasets"):
            hub.commits.append({**hub.files, "theirs.txt": b""})
            hub.titles.append("theirs")

    hub.after_each = intrude
    with pytest.raises(
        StillroomError, match=r"commit has happened since[^$]*run the same command to go on"
    ):
        send(hub, versions["old"])
    assert "README.md" not in hub.files
    hub.after_each = what_readers_see
    send(hub, versions["old"])
    assert {"README.md", "theirs.txt"} <= set(hub.files)


def test_a_repository_with_another_card_is_refused(hub, versions):
    hub.exists = True
    hub.commits.append({"README.md": b"---\nlicense: mit\n---\n\n# Mine\n"})
    with pytest.raises(UsageError, match="no export wrote"):
        send(hub, versions["old"])
    hub.commits.append({"README.md": b"---\nlicense: mit\n---\n"})  # as the web page makes them
    send(hub, versions["old"])


def test_what_is_to_be_private_does_not_go_where_all_can_read(hub, versions):
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token="hf_nobody")
    hub.exists = True
    with pytest.raises(UsageError, match="is public"):
        upload(versions["old"], REPO, say=silent, private=True, api=api)
    assert len(hub.commits) == 1
    hub.exists = False
    upload(versions["old"], REPO, say=silent, private=True, api=api)
    assert hub.private
    assert "README.md" in hub.files


def test_a_card_that_the_hub_refuses_is_refused_before_the_data(hub, versions):
    from dataclasses import replace

    card = versions["old"].card.replace("license: mit\n", "")
    with pytest.raises(UsageError, match="license is missing"):
        send(hub, replace(versions["old"], card=card))
    assert len(hub.commits) == 1
    assert not hub.exists


def test_publish_goes_by_a_folder_in_the_cache(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = make_store(tmp_path / "store")
    snapshots_of(store)
    given = {"license": "mit", "model_licenses": ("mit",), "source_licenses": ("mit",)}
    asked = PublishRequest(store=str(store.root), **given)
    done = publish(asked, f"hf://datasets/{REPO}", say=silent)
    assert done["built"] is True
    assert done["url"].endswith(REPO)
    assert f'load_dataset("{REPO}", "soft_targets"' in hub.files["README.md"].decode()
    from stillroom.storage.files.local import LocalFiles

    folder = Path(done["dir"])
    assert folder.is_relative_to(tmp_path / "cache")
    assert read_manifest(LocalFiles(folder)).version == done["version"]
    assert publish(asked, f"hf://datasets/{REPO}", say=silent)["built"] is False


@pytest.mark.parametrize(
    "place", ["hf://models/user/name", "s3://bucket/name", "hf://datasets/name"]
)
def test_other_places_are_refused(tmp_path, place):
    asked = PublishRequest(
        store=str(tmp_path), license="mit", model_licenses=("mit",), source_licenses=("mit",)
    )
    with pytest.raises(UsageError, match="hf://datasets/USER/NAME"):
        publish(asked, place, say=silent)
