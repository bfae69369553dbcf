"""Text that was routed somewhere is expected there, within a bound of bytes and time."""

from __future__ import annotations

from headrace_kernels.block_hash import hash_chunks, salt
from headrace_router.text_index import TextIndex
from headrace_router.types import BootId, Endpoints, Replica, ReplicaId, Request, Role

TEXT = bytes(range(256)) * 8


def replica(name: str, boot: str = "1") -> Replica:
    return Replica(ReplicaId(name), BootId(boot), "m", Role.UNIFIED, Endpoints("http://127.0.0.1:1"))


def request(text: bytes) -> Request:
    return Request("m", len(text), chunk_hashes=hash_chunks(text, 64, salt("m")))


def index_of(**settings: int) -> TextIndex:
    index = TextIndex(64, num_slots=4, life_s=600.0, **settings)
    index.follow([(replica("a"), 0), (replica("b"), 1)])
    return index


def hits(index: TextIndex, text: bytes, now_s: float) -> list[int]:
    found = index.look_up(request(text), now_s)
    assert found is not None
    assert found.source == "text"
    return found.tokens[:2].tolist()


def test_routed_text_is_expected_in_proportion_to_its_length() -> None:
    index = index_of()
    index.routed(request(TEXT), 1, 0.0)
    assert hits(index, TEXT, 1.0) == [0, 512]
    none, half = hits(index, TEXT[:1024] + b"x" * 1024, 1.0)
    assert (none, half) == (0, 256)
    index.check_integrity()


def test_counted_tokens_scale_the_guess() -> None:
    index = index_of()
    index.routed(request(TEXT), 1, 0.0)
    found = index.look_up(request(TEXT)._replace(prompt_tokens=100), 1.0)
    assert found is not None
    assert found.tokens[1] == 99


def test_text_is_forgotten_when_its_time_is_over_but_not_while_it_is_used() -> None:
    index = index_of()
    index.routed(request(TEXT), 1, 0.0)
    for minute in range(0, 60, 5):
        assert hits(index, TEXT, minute * 60.0)[1] > 0
        index.routed(request(TEXT), 1, minute * 60.0)
    assert hits(index, TEXT, 3600 + 1201.0) == [0, 0]


def test_restarted_replica_expects_nothing() -> None:
    index = index_of()
    index.routed(request(TEXT), 1, 0.0)
    index.follow([(replica("a"), 0), (replica("b", "2"), 1)])
    assert hits(index, TEXT, 1.0) == [0, 0]


def test_memory_is_bounded_and_the_latest_text_stays() -> None:
    index = index_of(max_bytes=400_000)
    text = b""
    for number in range(3000):
        text = number.to_bytes(4, "big") * 256
        index.routed(request(text), number % 2, 0.0)
    assert index.num_chunks <= 10_000
    assert index.memory_bytes < 2 * 400_000
    assert max(hits(index, text, 0.0)) > 200
    index.check_integrity()


def test_a_fleet_beyond_its_slots_has_hits_for_each_replica() -> None:
    index = index_of()
    index.follow([(replica(f"r{slot}"), slot) for slot in range(6)])
    index.routed(request(TEXT), 1, 0.0)
    index.routed(request(TEXT), 5, 0.0)
    found = index.look_up(request(TEXT), 1.0)
    assert found is not None
    assert found.tokens.tolist() == [0, 512, 0, 0, 0, 0]
