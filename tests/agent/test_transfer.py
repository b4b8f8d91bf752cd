"""Files in chunks: whatever the order, the losses and the restarts, the file is whole or it is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agents import transfer
from device_agents.package import LARGEST
from device_agents.transfer import CHUNK, MOST, Offer, Transfers, chunks, offer_of
from edge_adapt.errors import ArtifactError, ConfigError, DataError, StateError

DATA = np.random.default_rng(0).bytes(10_000)


def begin(folder: Path, id: str = "one", data: bytes = DATA, chunk: int = 512) -> tuple[Transfers, Offer]:
    made, offer = Transfers(folder), offer_of(data, chunk)
    assert made.offer(id, offer.model_dump_json().encode()) == [(1, offer.count)]
    return made, offer


def test_chunks_in_any_order_and_twice_make_the_file(tmp_path):
    made, offer = begin(tmp_path)
    sent = list(chunks(DATA, offer))
    np.random.default_rng(1).shuffle(sent)
    for number, piece in sent:
        assert made.receive("one", number, piece).problem is None
        assert not made.chunk("one", number, piece)
    path = made.complete("one")
    assert path.read_bytes() == DATA
    assert made.complete("one") == path
    assert [file.name for file in tmp_path.iterdir()] == ["one.done"]


def test_it_says_what_is_missing(tmp_path):
    made, offer = begin(tmp_path)
    for number, piece in chunks(DATA, offer, [(1, 3), (7, 7)]):
        progress = made.receive("one", number, piece)
    assert (progress.have, progress.count) == (4, 20)
    assert progress.missing == [(4, 6), (8, 20)]
    with pytest.raises(StateError, match=r"has 4 of 20 chunks; missing are \[\(4, 6\), \(8, 20\)\]"):
        made.complete("one")


def test_a_restart_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SYNC", 4)
    made, offer = begin(tmp_path)
    for number, piece in chunks(DATA, offer, [(3, 13)]):
        made.receive("one", number, piece)
    again = Transfers(tmp_path)  # what came since the last sync is asked for again
    missing = again.offer("one", offer.model_dump_json().encode())
    assert missing == [(1, 2), (11, 20)]
    for number, piece in chunks(DATA, offer, missing):
        assert again.receive("one", number, piece).problem is None
    assert Transfers(tmp_path).complete("one").read_bytes() == DATA


@settings(max_examples=30, deadline=None)
@given(
    st.binary(min_size=1, max_size=4000),
    st.integers(512, 1500),
    st.lists(st.one_of(st.integers(0, 9), st.just("restart")), max_size=30),
)
def test_it_is_whole_or_not_there(tmp_path_factory, data, size, steps):
    folder = tmp_path_factory.mktemp("transfer")
    made, offer = begin(folder, data=data, chunk=size)
    sent = dict(chunks(data, offer))
    for step in steps:
        if step == "restart":
            made = Transfers(folder)
        elif step in sent:
            made.receive("one", step, sent[step])
    for number, piece in chunks(data, offer, made.offer("one", offer.model_dump_json().encode())):
        assert made.chunk("one", number, piece)
    assert made.complete("one").read_bytes() == data


def test_another_content_is_refused_and_asked_for_again(tmp_path):
    made, offer = begin(tmp_path)
    for number, piece in chunks(DATA, offer):
        made.receive("one", number, piece if number != 5 else bytes(len(piece)))
    with pytest.raises(ArtifactError, match="has sha256"):
        made.complete("one")
    assert made.offer("one", offer.model_dump_json().encode()) == [(1, 20)]
    for number, piece in chunks(DATA, offer):
        made.receive("one", number, piece)
    assert made.complete("one").read_bytes() == DATA


@pytest.mark.parametrize(
    ("number", "piece", "problem"),
    [(1, b"x", "has 1 bytes"), (21, b"", "none of 1 to 20"), (20, bytes(512), "expected 272"), (10**9, b"", "none of")],
)
def test_a_chunk_that_does_not_fit_is_refused(tmp_path, number, piece, problem):
    made, _ = begin(tmp_path)
    assert problem in (made.receive("one", number, piece).problem or "")
    with pytest.raises(DataError):
        made.chunk("one", number, piece)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[" * 5000,
        b"null",
        b'{"size": 1}',
        json.dumps({"size": LARGEST + 1, "sha256": "0" * 64, "chunk": 4096}).encode(),
        json.dumps({"size": 0, "sha256": "0" * 64, "chunk": 4096}).encode(),
        json.dumps({"size": 9, "sha256": "0" * 64, "chunk": 1}).encode(),
        json.dumps({"size": 9, "sha256": "../../etc", "chunk": 512}).encode(),
        json.dumps({"size": 9.5, "sha256": "0" * 64, "chunk": 512}).encode(),
        json.dumps({"size": 9, "sha256": "0" * 64, "chunk": 512, "path": "/etc"}).encode(),
    ],
)
def test_a_wrong_offer_leaves_nothing_behind(tmp_path, payload):
    made = Transfers(tmp_path / "inbox")
    assert "offer is wrong" in (made.receive("one", 0, payload).problem or "")
    assert not (tmp_path / "inbox").exists()


@pytest.mark.parametrize("id", ["../one", "", "a/b", ".hidden", "x" * 65, "a\n"])
def test_an_id_is_no_path(tmp_path, id):
    made, payload = Transfers(tmp_path), offer_of(DATA).model_dump_json().encode()
    with pytest.raises(ConfigError, match="no id of a transfer"):
        made.offer(id, payload)
    with pytest.raises(StateError):
        made.complete(id)
    made.forget(id)
    assert not list(tmp_path.iterdir())


def test_a_chunk_that_nobody_offered_is_refused(tmp_path):
    assert "no transfer 'one'" in (Transfers(tmp_path).receive("one", 1, b"x").problem or "")
    assert not list(tmp_path.iterdir())


def test_there_are_only_so_many_and_the_oldest_idle_one_goes_first(tmp_path):
    now = [0.0]
    made, payload = Transfers(tmp_path, expiry_s=60, clock=lambda: now[0]), offer_of(DATA).model_dump_json().encode()
    for number in range(MOST):
        now[0] = float(number)
        made.offer(f"t{number}", payload)
    with pytest.raises(StateError, match="4 transfers are open"):
        made.offer("more", payload)
    now[0] = 61.0
    made.offer("more", payload)
    assert sorted(path.stem for path in tmp_path.glob("*.part")) == ["more", "t1", "t2", "t3"][:4]


def test_only_so_many_complete_files_are_kept(tmp_path):
    for number in range(MOST + 2):
        made, offer = begin(tmp_path, f"t{number}", bytes([number]) * 600)
        for place, piece in chunks(bytes([number]) * 600, offer):
            made.chunk(f"t{number}", place, piece)
        made.complete(f"t{number}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"t{number}.done" for number in range(2, MOST + 2)]
    made.forget("t5")
    assert not (tmp_path / "t5.done").exists()


def test_another_offer_of_the_same_id_starts_anew(tmp_path):
    made, offer = begin(tmp_path)
    made.chunk("one", 1, DATA[:512])
    other = offer_of(DATA[::-1], 512)
    assert made.offer("one", other.model_dump_json().encode()) == [(1, 20)]
    assert offer != other


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"offer": {}, "missing": []}', b"\xff"])
def test_damaged_records_are_dropped(tmp_path, damage):
    made, offer = begin(tmp_path)
    (tmp_path / "one.offer").write_bytes(damage)
    made = Transfers(tmp_path)
    assert not list(tmp_path.iterdir())
    assert made.offer("one", offer.model_dump_json().encode()) == [(1, 20)]


def test_a_part_file_of_another_size_is_dropped(tmp_path):
    begin(tmp_path)
    os.truncate(tmp_path / "one.part", 5)
    Transfers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_record_may_not_name_chunks_that_there_are_not(tmp_path):
    begin(tmp_path)
    record = json.loads((tmp_path / "one.offer").read_bytes())
    (tmp_path / "one.offer").write_text(json.dumps({**record, "missing": [[1, 10**12]]}))
    Transfers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_is_told_of(tmp_path):
    (tmp_path / "inbox").write_bytes(b"a file")
    made = Transfers(tmp_path / "inbox")
    told = made.receive("one", 0, offer_of(DATA).model_dump_json().encode())
    assert "cannot be kept" in (told.problem or "")


def test_the_usual_chunk_fits_into_the_smallest_broker_limit():
    assert CHUNK < 16_384 - 512
    assert offer_of(bytes(LARGEST)).count < 6000


def test_many_small_chunks_stay_cheap(tmp_path):
    data = bytes(512 * 20_000)
    made, offer = begin(tmp_path, data=data)
    for number, piece in chunks(data, offer, [(number, number) for number in range(1, 4000, 2)]):
        made.receive("one", number, piece)
    assert len(made.offer("one", offer.model_dump_json().encode())) == 2000
