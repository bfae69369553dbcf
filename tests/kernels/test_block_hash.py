"""Block hashes: equal to their plain definition, chained, well mixed."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_kernels.block_hash import hash_blocks, hash_blocks_reference, hash_chunks, salt

tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=200)
parents = st.integers(0, 2**64 - 1)


@given(tokens_lists, st.integers(1, 40), parents)
def test_the_kernel_equals_the_plain_definition(tokens: list[int], block_size: int, parent: int) -> None:
    assert hash_blocks(tokens, block_size, parent).tolist() == hash_blocks_reference(
        tokens, block_size, parent
    )


@given(tokens_lists, st.integers(1, 20), st.integers(0, 12), parents)
def test_a_chain_goes_on_from_the_hash_of_the_block_before(
    tokens: list[int], block_size: int, blocks: int, parent: int
) -> None:
    whole = hash_blocks(tokens, block_size, parent).tolist()
    head = whole[:blocks]
    tail = hash_blocks(tokens[len(head) * block_size :], block_size, head[-1] if head else parent)
    assert head + tail.tolist() == whole


@pytest.mark.parametrize(
    "form",
    [
        lambda ids: np.array(ids, np.int32),
        lambda ids: np.array(ids, np.int64),
        lambda ids: np.array(ids, np.uint64),
        lambda ids: np.array(ids, np.uint16),
        lambda ids: np.array([ids, ids], np.uint32).T[:, 0],  # strided
        lambda ids: array("I", ids),
        lambda ids: array("q", ids),
        lambda ids: memoryview(array("I", ids)),
        tuple,
        list,
    ],
)
def test_every_form_of_token_ids_has_the_same_hashes(form: object) -> None:
    ids = np.random.default_rng(1).integers(0, 50_000, 100).tolist()
    expected = hash_blocks_reference(ids, 16, 7)
    assert hash_blocks(form(ids), 16, 7).tolist() == expected  # type: ignore[operator]


def test_a_32_bit_buffer_is_read_in_place_and_stays_writable() -> None:
    ids = array("I", range(64))
    before = hash_blocks(ids, 16, 0)
    ids[0] = 99
    assert hash_blocks(ids, 16, 0)[0] != before[0]
    own = np.arange(64, dtype=np.uint32)
    hash_blocks(own, 16, 0)
    assert own.flags.writeable


def test_only_full_blocks_are_hashed() -> None:
    assert hash_blocks([], 16, 0).size == 0
    assert hash_blocks(range(15), 16, 0).size == 0
    assert hash_blocks(range(33), 16, 0).size == 2


def test_a_block_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 0"):
        hash_blocks([1], 0, 0)


def test_one_flipped_bit_flips_half_of_the_hash() -> None:
    generator = np.random.default_rng(20)
    ids = generator.integers(0, 150_000, 16).astype(np.uint32)
    plain = int(hash_blocks(ids, 16, 5)[0])
    flips = np.zeros((16 * 32, 64))
    for at in range(16):
        for bit in range(32):
            changed = ids.copy()
            changed[at] ^= np.uint32(1 << bit)
            difference = plain ^ int(hash_blocks(changed, 16, 5)[0])
            flips[at * 32 + bit] = [difference >> out & 1 for out in range(64)]
    # 512 trials per output bit, 64 per input bit: five standard deviations around one half.
    assert abs(flips.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(512)
    assert abs(flips.mean(axis=1) - 0.5).max() < 5 * 0.5 / np.sqrt(64)


def test_a_million_structured_blocks_do_not_collide() -> None:
    """Counting tokens, the worst input for a weak mixer: every block differs from another in one small number."""
    ids = np.zeros((1 << 20, 4), np.uint32)
    ids[:, 3] = np.arange(1 << 20) & 0x3FF
    ids[:, 1] = np.arange(1 << 20) >> 10
    assert np.unique(hash_blocks(ids, 4, 0)).size == 1 << 20
    roots = np.concatenate([hash_blocks(block, 4, 0) for block in ids[::16]])
    assert np.unique(roots).size == roots.size
    # ...and fill the top and the bottom 12 bits evenly: 16 per bucket, standard deviation 4.
    for buckets in (roots >> np.uint64(52), roots & np.uint64(4095)):
        assert np.bincount(buckets.astype(np.int64), minlength=4096).max() < 16 + 7 * 4


def test_model_adapter_salt_and_seed_each_set_prompts_apart() -> None:
    salts = [
        salt("m"),
        salt("m", lora=""),
        salt("m", lora="a"),
        salt("m", cache_salt="a"),
        salt("ma"),
        salt("m", lora="a", cache_salt="b"),
        salt("m", lora="ab", cache_salt=""),
        salt("m", seed=1),
    ]
    assert len(set(salts)) == len(salts)
    assert salt("m", lora="a") == salts[2]
    assert len({hash_blocks(range(16), 16, parent)[0] for parent in salts}) == len(salts)


def test_salt_and_hash_values_are_stable() -> None:
    """Recorded hashes outlive a process (traces, snapshots): a new value here is a new format."""
    assert salt("smollm2", lora="l", cache_salt="c", seed=3) == 13806823161717597429
    assert hash_blocks(range(32), 16, 1).tolist() == [13902578124147772198, 11052159516846049019]


@given(st.binary(max_size=600), st.sampled_from([4, 16, 64]), parents)
def test_chunks_of_text_are_blocks_of_little_endian_words(text: bytes, chunk_bytes: int, parent: int) -> None:
    words = [int.from_bytes(text[at : at + 4], "little") for at in range(0, len(text) // 4 * 4, 4)]
    expected = hash_blocks_reference(words, chunk_bytes // 4, parent)
    assert hash_chunks(text, chunk_bytes, parent).tolist() == expected
    unaligned = memoryview(b"x" + text)[1:]
    assert hash_chunks(unaligned, chunk_bytes, parent).tolist() == expected
    assert hash_chunks(bytearray(text), chunk_bytes, parent).tolist() == expected


def test_a_chunk_size_that_is_no_multiple_of_four_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_bytes is 6"):
        hash_chunks(b"abcdefgh", 6, 0)
