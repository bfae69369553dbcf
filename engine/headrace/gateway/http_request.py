"""What the relay reads of a request's headers, in one pass: what to forward, who asks, how the body is framed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

Header = tuple[bytes, bytes]

# Never forwarded as they are: they describe one connection (RFC 9110, 7.6.1), or are written anew for the replica.
_FORWARD, _DROP, _AUTHORIZATION, _REQUEST_ID, _LENGTH, _TYPE, _EXPECT, _EXPLAIN, _TENANT, _TIMEOUT = range(10)
_MEANINGS = {
    **dict.fromkeys(
        b"host connection keep-alive proxy-connection proxy-authorization te trailer transfer-encoding upgrade "
        b"http2-settings accept-encoding".split(),
        _DROP,
    ),
    b"authorization": _AUTHORIZATION,
    b"x-request-id": _REQUEST_ID,
    b"content-length": _LENGTH,
    b"content-type": _TYPE,
    b"expect": _EXPECT,
    b"x-headrace-explain": _EXPLAIN,
    b"x-stainless-read-timeout": _TIMEOUT,  # OpenAI's and Anthropic's clients tell their own, in seconds
}
OWN_NAMES = frozenset(name.decode() for name, meaning in _MEANINGS.items() if meaning != _TIMEOUT)
"""Header names with a meaning of their own."""


class RequestHead(NamedTuple):
    """The headers of one request."""

    fields: bytes  # header lines to forward, each ended by CRLF
    authorization: bytes | None
    request_id: bytes | None  # as the client gave it, unchecked
    content_length: int | None
    is_form: bool  # multipart, as audio comes
    expects_continue: bool
    explain: bool  # the client wants to see the decision in the answer's headers
    tenant: bytes | None  # as the client gave it, unchecked
    timeouts: tuple[bytes, ...]  # seconds that the client will wait, as it gave them, unchecked


def meanings(tenant_header: str, timeout_header: str) -> Mapping[bytes, int]:
    """What `read_head` makes of header names, with two that are configured."""
    return {
        **_MEANINGS,
        timeout_header.lower().encode(): _TIMEOUT,
        tenant_header.lower().encode(): _TENANT,
    }


def read_head(headers: Iterable[Header], known: Mapping[bytes, int] = _MEANINGS) -> RequestHead:
    """Sort the headers of a request. Names are lower case; the parser has checked their form."""
    fields: list[bytes] = []
    authorization = request_id = content_length = tenant = None
    timeouts: tuple[bytes, ...] = ()
    is_form = expects_continue = explain = False
    for name, value in headers:
        meaning = known.get(name, _FORWARD)
        if meaning == _FORWARD:
            fields += (name, b": ", value, b"\r\n")
        elif meaning == _TYPE:
            fields += (name, b": ", value, b"\r\n")
            is_form = value.startswith(b"multipart/form-data")
        elif meaning == _AUTHORIZATION:
            authorization = value
        elif meaning == _REQUEST_ID:
            request_id = value
        elif meaning == _LENGTH:
            content_length = int(value) if value.isdigit() else None
        elif meaning == _EXPECT:
            expects_continue = value.lower() == b"100-continue"
        elif meaning == _EXPLAIN:
            explain = value not in (b"0", b"false")
        elif meaning == _TENANT:
            fields += (name, b": ", value, b"\r\n")
            tenant = value
        elif meaning == _TIMEOUT:
            fields += (name, b": ", value, b"\r\n")
            timeouts += (value,)
    return RequestHead(
        b"".join(fields),
        authorization,
        request_id,
        content_length,
        is_form,
        expects_continue,
        explain,
        tenant,
        timeouts,
    )
