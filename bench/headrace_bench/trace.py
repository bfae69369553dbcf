"""Traces of real traffic: when requests came, how long they were, what they shared.

    Mooncake  JSON lines {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [..]};
              an id names 512 tokens of prompt, so equal leading ids mean an equal prefix.
              Public in the repository kvcache-ai/Mooncake (FAST25-release/traces), Apache-2.0.
    Azure     CSV with the columns TIMESTAMP,ContextTokens,GeneratedTokens; nothing of shared prefixes.
              Public in the repository Azure/AzurePublicDataset (AzureLLMInferenceTrace_*.csv), CC-BY-4.0.

Either may be gzipped. Arrivals are shifted so that the first request comes at 0 s.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from headrace.errors import CallerError

BLOCK_TOKENS = 512
"""Prompt tokens named by one hash id of a Mooncake trace. The last block of a prompt may be shorter."""

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(CallerError):
    """A trace that cannot be read. The message names the file, the row and what is wrong there."""


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One request of a trace."""

    arrival_s: float  # since the first request
    input_tokens: int  # at least 1
    output_tokens: int  # at least 1
    hash_ids: tuple[int, ...] = ()  # of BLOCK_TOKENS each; empty where the trace says nothing of prefixes


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = msgspec.field(default_factory=list)


def read_trace(path: str | Path) -> tuple[TraceRecord, ...]:
    """Read a Mooncake or Azure trace; the first line tells which it is. Sorted by arrival.

    Raises `TraceError` where the file is missing, empty or a row is malformed (with its line number).
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"trace {path} cannot be read: {error}") from error
    return parse_trace(text, name=str(path))


def parse_trace(text: str, name: str = "trace") -> tuple[TraceRecord, ...]:
    """Like `read_trace`, of text in hand. `name` stands in error messages."""
    head = text.lstrip()[:1]
    if not head:
        raise TraceError(f"{name} is empty")
    rows = _mooncake_rows(text, name) if head == "{" else _azure_rows(text, name)
    records = sorted(rows, key=lambda record: record.arrival_s)
    if not records:
        raise TraceError(f"{name} holds no request")
    first_s = records[0].arrival_s
    return tuple(replace(record, arrival_s=record.arrival_s - first_s) for record in records)


def rescale(records: Sequence[TraceRecord], speed: float) -> tuple[TraceRecord, ...]:
    """The same requests, arriving `speed` times as fast."""
    if not speed > 0:
        raise TraceError(f"speed must be above 0, got {speed}")
    return tuple(replace(record, arrival_s=record.arrival_s / speed) for record in records)


def truncate(
    records: Sequence[TraceRecord], requests: int | None = None, duration_s: float | None = None
) -> tuple[TraceRecord, ...]:
    """The first `requests` of those that arrive within `duration_s`; None is no bound."""
    kept = records if duration_s is None else [r for r in records if r.arrival_s <= duration_s]
    return tuple(kept[:requests])


def _mooncake_rows(text: str, name: str) -> Iterator[TraceRecord]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise TraceError(f"{name}, row {number}: {error}") from error
        yield _checked(
            f"{name}, row {number}", row.timestamp / 1000, row.input_length, row.output_length, row.hash_ids
        )


def _azure_rows(text: str, name: str) -> Iterator[TraceRecord]:
    rows = csv.reader(io.StringIO(text))
    header = next(rows)
    try:
        columns = [header.index(column) for column in AZURE_COLUMNS]
    except ValueError:
        raise TraceError(
            f"{name} is neither a Mooncake trace (JSON lines) nor an Azure one: row 1 must hold "
            f"{','.join(AZURE_COLUMNS)}, got {','.join(header)[:80]!r}"
        ) from None
    for row in rows:
        number = rows.line_num
        if not row:
            continue
        try:
            when, context, generated = (row[column] for column in columns)
            arrival_s = _timestamp_s(when)
            yield _checked(f"{name}, row {number}", arrival_s, int(context), int(generated), ())
        except (ValueError, IndexError) as error:
            raise TraceError(f"{name}, row {number}: {error} in {','.join(row)[:80]!r}") from error


def _timestamp_s(text: str) -> float:
    # The traces carry 100 ns digits, which datetime does not read, so the fraction is parsed by hand.
    whole, _, fraction = text.strip().partition(".")
    digits = fraction.split("+")[0].rstrip("Z")
    moment = datetime.fromisoformat(whole).replace(tzinfo=UTC)
    return moment.timestamp() + (float(f"0.{digits}") if digits else 0.0)


def _checked(
    where: str, arrival_s: float, input_tokens: int, output_tokens: int, hash_ids: Sequence[int]
) -> TraceRecord:
    if arrival_s < 0 or input_tokens < 1 or output_tokens < 0:
        raise TraceError(
            f"{where}: arrival {arrival_s} s, {input_tokens} tokens in, {output_tokens} out; "
            "arrivals and outputs must not be negative, inputs must be at least 1"
        )
    num_blocks = -(-input_tokens // BLOCK_TOKENS)
    if hash_ids and len(hash_ids) != num_blocks:
        raise TraceError(
            f"{where}: {len(hash_ids)} hash_ids for {input_tokens} tokens; "
            f"blocks of {BLOCK_TOKENS} tokens make it {num_blocks}"
        )
    # A request that generated nothing still produces one token when it is replayed.
    return TraceRecord(arrival_s, input_tokens, max(1, output_tokens), tuple(hash_ids))
