"""The part of a JSON body that makes the prompt, as raw bytes: what the text index hashes in chunks.

Nothing is rendered: equal beginnings of equal conversations are equal bytes as long as a client writes its JSON the
same way each time, and clients do.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace_kernels.block_hash import hash_chunks

CHUNK_BYTES = 256
"""About 64 tokens: a few blocks. Smaller chunks find more and cost more entries."""

_EMPTY = msgspec.Raw()


class _Text(msgspec.Struct, gc=False):
    """Whatever the inference paths call their prompt. In a template tools and system come before messages."""

    tools: msgspec.Raw = _EMPTY
    system: msgspec.Raw = _EMPTY
    instructions: msgspec.Raw = _EMPTY
    messages: msgspec.Raw = _EMPTY
    prompt: msgspec.Raw = _EMPTY
    input: msgspec.Raw = _EMPTY
    cache_salt: str | None = None


_decode = msgspec.json.Decoder(_Text).decode


def prompt_text(body: bytes) -> tuple[bytes, str | None]:
    """The prompt's bytes and the request's cache salt. Empty where the body holds no prompt that is known here."""
    try:
        text = _decode(body)
    except (msgspec.MsgspecError, UnicodeError):
        return b"", None
    parts = (text.tools, text.system, text.instructions, text.messages, text.prompt, text.input)
    present = [bytes(part) for part in parts if bytes(part)]
    return present[0] if len(present) == 1 else b"".join(present), text.cache_salt


def chunk_hashes(text: bytes, parent: int) -> NDArray[np.uint64]:
    """Chained hashes of the full chunks, from `headrace_kernels.block_hash.salt(...)` as the parent of the first."""
    return hash_chunks(text, CHUNK_BYTES, parent)
