"""Folders of heads on disk and behind fsspec: the same heads, whole or not at all."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from tests.conftest import random_head, write_heads
from value_models import files
from value_models.errors import HeadFileError
from value_models.head_folder import HeadFolder, StoredHeads, open_heads
from value_models.store import CARD_FILE, HEAD_FILE

IDENTITY = {"name": "tiny", "hidden_size": 32}
NAMES = itertools.count()


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECONTROL_CACHE_DIR", str(tmp_path / "cache"))
    return files.cache_root() / "heads"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return write_heads(tmp_path / "made", {"kind": random_head(1), "plain": random_head(2)}, IDENTITY)


@pytest.fixture(params=["path", "file", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place for heads of each kind."""
    name = f"heads-{next(NAMES)}"
    if request.param == "memory":
        yield f"memory://bucket/{name}"
        fsspec.filesystem("memory").rm("/", recursive=True)
    else:
        (tmp_path / name).mkdir()
        yield f"file://{tmp_path / name}" if request.param == "file" else str(tmp_path / name)


def put(location: str, file: str, data: bytes) -> None:
    with fsspec.open(f"{location}/{file}", "wb") as target:
        target.write(data)  # type: ignore[attr-defined]


def same(folder: HeadFolder, name: str, seed: int) -> bool:
    states_BD = torch.randn(3, 32)
    return torch.equal(folder.load(name)[0].value(states_BD), random_head(seed).value(states_BD))


def test_what_was_published_is_listed_and_read_back(made: Path, location: str) -> None:
    folder = open_heads(location)
    for name in ("plain", "kind"):
        folder.publish(name, open_heads(made))
    assert open_heads(location).names() == ["kind", "plain"]
    assert same(folder, "kind", 1)
    assert same(folder, "plain", 2)
    assert folder.card("kind") == open_heads(made).card("kind")


def test_each_look_sees_what_has_changed(made: Path, location: str, tmp_path: Path) -> None:
    folder = open_heads(location)
    folder.publish("kind", open_heads(made))
    assert folder.names() == ["kind"]
    folder.publish("plain", open_heads(made))
    other = write_heads(tmp_path / "other", {"kind": random_head(3)}, IDENTITY)
    folder.publish("kind", open_heads(other))
    assert folder.names() == ["kind", "plain"]
    assert same(folder, "kind", 3)


def test_half_a_head_is_refused_whichever_half_is_new(made: Path, location: str, tmp_path: Path) -> None:
    folder = open_heads(location)
    folder.publish("kind", open_heads(made))
    other = write_heads(tmp_path / "other", {"kind": random_head(3)}, IDENTITY)
    old, new = ({file: (source / "kind" / file).read_bytes() for file in (HEAD_FILE, CARD_FILE)}
                for source in (made, other))  # fmt: skip
    for half in ({HEAD_FILE: new[HEAD_FILE][:-1]}, {HEAD_FILE: b""}, {CARD_FILE: new[CARD_FILE]}):
        for file, data in {**old, **half}.items():
            put(f"{location}/kind", file, data)
        with pytest.raises(HeadFileError, match="tensors_sha256"):
            folder.load("kind")
    put(f"{location}/kind", CARD_FILE, old[CARD_FILE][:100])
    with pytest.raises(HeadFileError, match=r"kind/card.json is not a head card"):
        folder.load("kind")


def test_a_place_that_is_not_there_is_told(location: str) -> None:
    with pytest.raises(HeadFileError, match="nowhere"):
        open_heads(f"{location}/nowhere").names()


@pytest.mark.parametrize("name", ["", "..", "../kind", "/etc", "a/b", "s3://b/x", "kind\n", "*", "x" * 65])
def test_what_is_no_name_is_never_opened(location: str, name: str) -> None:
    with pytest.raises(HeadFileError, match="no name"):
        open_heads(location).load(name)


def test_a_store_that_is_not_known_says_what_to_install() -> None:
    for url in ("nonsense://bucket/heads", "memory::nonsense://x"):
        with pytest.raises(HeadFileError, match=r"recontrol\[object-store\]"):
            open_heads(url)


@pytest.fixture
def stored(made: Path) -> Iterator[StoredHeads]:
    folder = open_heads(f"memory://bucket/heads-{next(NAMES)}")
    folder.publish("kind", open_heads(made))
    assert isinstance(folder, StoredHeads)
    yield folder
    fsspec.filesystem("memory").rm("/", recursive=True)


def test_tensors_are_fetched_once_and_again_when_the_cached_ones_are_damaged(
    stored: StoredHeads, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    cat_file = stored._filesystem.cat_file
    monkeypatch.setattr(
        stored._filesystem, "cat_file", lambda path: (fetched.append(path.split("/")[-1]), cat_file(path))[1]
    )
    for _ in range(3):
        assert same(stored, "kind", 1)
    assert fetched == [CARD_FILE, HEAD_FILE, CARD_FILE, CARD_FILE]
    (file,) = cached.iterdir()
    assert file.name == f"{stored.card('kind').tensors_sha256}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert same(stored, "kind", 1)
    assert fetched[-1] == HEAD_FILE
    assert same(stored, "kind", 1)
    assert fetched[-1] == CARD_FILE


def test_tensors_that_are_not_the_cards_are_not_cached(stored: StoredHeads, cached: Path) -> None:
    put(f"{stored.location}/kind", HEAD_FILE, b"broken")
    with pytest.raises(HeadFileError, match="tensors_sha256"):
        stored.load("kind")
    assert not cached.exists()


def test_where_nothing_can_be_cached_heads_are_read_all_the_same(
    stored: StoredHeads, cached: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached.parent.mkdir()
    cached.write_text("no folder")
    assert same(stored, "kind", 1)
    assert "'kind' is not cached" in caplog.text


@pytest.mark.parametrize("digest", ["", "../../../etc/passwd", "/tmp/x", "0" * 63, "G" * 64])
def test_a_card_cannot_lead_the_cache_elsewhere(stored: StoredHeads, digest: str) -> None:
    card = json.loads(stored._read("kind", CARD_FILE)) | {"tensors_sha256": digest}
    put(f"{stored.location}/kind", CARD_FILE, json.dumps(card).encode())
    with pytest.raises(HeadFileError, match="no SHA-256"):
        stored.load("kind")


def test_a_card_of_another_name_is_refused(stored: StoredHeads) -> None:
    for file in (HEAD_FILE, CARD_FILE):
        put(f"{stored.location}/other", file, stored._read("kind", file))
    with pytest.raises(HeadFileError, match="names its head 'kind'"):
        stored.load("other")


def test_a_head_with_numbers_that_are_none_is_refused(tmp_path: Path) -> None:
    broken = random_head(1)
    broken.inputs_UD[0, 0] = float("nan")
    with pytest.raises(HeadFileError, match="not finite"):
        write_heads(tmp_path / "broken", {"kind": broken}, IDENTITY)


def test_what_a_store_throws_is_told_with_the_place(stored: StoredHeads, monkeypatch: pytest.MonkeyPatch) -> None:
    class BackendError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise BackendError("access denied")

    calls: list[tuple[str, Callable[[], object]]] = [("glob", stored.names), ("cat_file", lambda: stored.card("kind"))]
    for method, call in calls:
        monkeypatch.setattr(stored._filesystem, method, fail)
        with pytest.raises(HeadFileError, match=r"memory://bucket/.*BackendError: access denied"):
            call()
