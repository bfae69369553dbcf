"""Traces: both formats, their mistakes, rescaling and truncation."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_bench.trace import TraceError, TraceRecord, parse_trace, read_trace, rescale, truncate

MOONCAKE = """\
{"timestamp": 1000, "input_length": 600, "output_length": 20, "hash_ids": [0, 7]}
{"timestamp": 2500, "input_length": 512, "output_length": 0, "hash_ids": [0]}

{"timestamp": 2000, "input_length": 1, "output_length": 5, "hash_ids": [9], "more": true}
"""
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:48.6805900,396,109"
)


def test_mooncake_rows_become_records_sorted_by_arrival() -> None:
    assert parse_trace(MOONCAKE) == (
        TraceRecord(0.0, 600, 20, (0, 7)),
        TraceRecord(1.0, 1, 5, (9,)),
        TraceRecord(1.5, 512, 1, (0,)),  # nothing generated is replayed as one token
    )


def test_azure_rows_become_records_without_hash_ids() -> None:
    assert parse_trace(AZURE) == (TraceRecord(0.0, 374, 44), TraceRecord(pytest.approx(2.0), 396, 109))


@pytest.mark.parametrize("text", [MOONCAKE, AZURE])
def test_a_gzipped_trace_and_a_byte_order_mark_read_alike(tmp_path: Path, text: str) -> None:
    plain, packed = tmp_path / "trace", tmp_path / "trace.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + text.encode())
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_trace(plain) == read_trace(packed) == parse_trace(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("hello,world\n1,2", "neither a Mooncake trace"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 3}\n{"timestamp": 0}', "row 2"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 3}', "row 1"),
        (
            '{"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1]}',
            "1 hash_ids for 600 tokens",
        ),
        ('{"timestamp": 0, "input_length": "x", "output_length": 3}', "row 1"),
        ('{"timestamp": 0, "input_l', "row 1"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,x,44", "row 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,44", "row 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,7", "row 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
    ],
)
def test_a_malformed_trace_names_its_row_in_one_line(text: str, said: str) -> None:
    with pytest.raises(TraceError, match=said) as caught:
        parse_trace(text, name="some.trace")
    assert caught.value.message.startswith("some.trace")
    assert "\n" not in caught.value.message


def test_a_missing_or_damaged_file_is_a_trace_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "none")
    damaged = tmp_path / "damaged.gz"
    damaged.write_bytes(gzip.compress(MOONCAKE.encode())[:40])
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(damaged)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "binary")


@settings(deadline=None)
@given(st.floats(0.01, 100))
def test_twice_the_speed_is_half_the_time(speed: float) -> None:
    records = parse_trace(MOONCAKE)
    faster = rescale(records, speed)
    assert [r.arrival_s for r in faster] == pytest.approx([r.arrival_s / speed for r in records])
    assert [r.hash_ids for r in faster] == [r.hash_ids for r in records]


def test_truncation_bounds_count_and_time() -> None:
    records = parse_trace(MOONCAKE)
    assert truncate(records) == records
    assert len(truncate(records, requests=2)) == 2
    assert len(truncate(records, duration_s=1.0)) == 2
    assert len(truncate(records, requests=1, duration_s=1.0)) == 1


def test_speed_zero_is_refused() -> None:
    with pytest.raises(TraceError, match="above 0"):
        rescale(parse_trace(MOONCAKE), 0)
