"""Prefill here, decode there: the first half of a request, and what the second half takes from it.

    FirstHalf   sends the client's body, cut to one token, to the prefilling replica
        ├─ 200      prefilled: the blocks are held there, `second_half` names them to the decoding replica
        ├─ 4xx      refused: the client's fault, told as that replica told it; nothing is tried again
        └─ else     failed: another prefilling replica, or none
    release     frees held blocks that nobody will fetch: the client left, or the decoding replica died

A decoding vLLM that never sees its half leaves the blocks held until their lease ends (30 s); one that sees it and
loses its client frees them itself. Releasing once more than needed does no harm, so it is done whenever the decoding
replica has not begun its answer.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import msgspec

from headrace.backends.front_door import RELEASE_PATH
from headrace.backends.kv_connectors import HAND_OVER
from headrace.errors import BadRequest
from headrace.gateway import reach
from headrace.gateway.http_response import ResponseHead
from headrace.gateway.upstream import Target
from headrace_router.router import Handover
from headrace_router.types import ReplicaId

if TYPE_CHECKING:
    from headrace.gateway.context import GatewayContext

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Of a first half. Block ids take 7 bytes each, log probabilities of a prompt's last token a few kilobytes."""

PATHS = frozenset({b"/v1/chat/completions", b"/v1/completions"})


class _Asked(msgspec.Struct, gc=False):
    """The fields of a body that decide whether its two halves may run in different places."""

    n: object = None
    best_of: object = None
    use_beam_search: object = None
    echo: object = None
    prompt_logprobs: object = None
    prompt_embeds: object = None
    prompt: object = None
    kv_transfer_params: object = None


class _Held(msgspec.Struct, gc=False):
    remote_request_id: str | None = None


class _Prefilled(msgspec.Struct, gc=False):
    """What an engine answers to a first half, as far as the second needs it."""

    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")


_decode_asked = msgspec.json.Decoder(_Asked).decode
_decode_prefilled = msgspec.json.Decoder(_Prefilled).decode
_decode_held = msgspec.json.Decoder(_Held).decode


def can_hand_over(path: bytes, body: bytes) -> bool:
    """Whether another replica may compute the prompt: one prompt, one answer, and nothing asked of the prompt itself
    (its echo or log probabilities come from the replica that computes it).

    Raises BadRequest where a client brings `kv_transfer_params`, on any path: they name an address that the replica
    would connect to, and another request's blocks.
    """
    try:
        asked = _decode_asked(body)
    except msgspec.DecodeError:
        return False
    if asked.kv_transfer_params is not None:
        raise BadRequest(
            "kv_transfer_params is the gateway's to set; leave it out", param="kv_transfer_params"
        )
    if path not in PATHS:
        return False
    return (
        (asked.n is None or asked.n == 1)
        and (asked.best_of is None or asked.best_of == 1)
        and not asked.use_beam_search
        and not asked.echo
        and asked.prompt_logprobs is None
        and asked.prompt_embeds is None
        and (path == b"/v1/chat/completions" or _is_single(asked.prompt))
    )


def _is_single(prompt: object) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and (len(prompt) == 1 or isinstance(prompt[0], int))
    return isinstance(prompt, str)


def first_half(body: bytes, path: bytes, connector: str) -> bytes:
    """The same body, cut to one token that nobody reads. Appended, since of a key given twice JSON readers take the
    last one."""
    params = HAND_OVER[connector].first
    extra = b',"stream":false,"stream_options":null,"max_tokens":1,"min_tokens":0'
    if path == b"/v1/chat/completions":
        extra += b',"max_completion_tokens":1'
    if params is not None:
        extra += b',"kv_transfer_params":' + params
    return b"%b%b}" % (body[: body.rindex(b"}")], extra)


def second_half(body: bytes, params: bytes) -> bytes:
    """The same body with what the first half's engine said of the blocks; its bytes otherwise as they came."""
    if not params:
        return body
    return b'{"kv_transfer_params":%b,%b' % (params, body[body.index(b"{") + 1 :])


class Errand(reach.Errand, Protocol):
    """The exchange, as the first half of its request knows it."""

    def request_to(self, target: Target, body: bytes, request_id: bytes) -> bytes:
        """The client's HTTP request with another body, under another name."""
        ...

    def prefilled(self) -> None:
        """The prompt is computed; the second half may go out."""
        ...

    def prefill_refused(self, head: ResponseHead, body: bytes) -> None:
        """The client's fault, in the replica's words."""
        ...

    def prefill_failed(self, reason: str, *, suspend: bool = False) -> None:
        """The replica's fault. It holds nothing that is known of."""
        ...


class FirstHalf(reach.Reach):
    """The prefilling replica's answer. `stop` is the one way out and safe twice."""

    _errand: Errand
    is_done = False  # the prompt is computed
    is_taken = False  # the decoding replica has begun to answer: it has the blocks
    params = b""  # kv_transfer_params for the second half
    _head: ResponseHead | None = None
    _body = b""
    _stopped = False

    def __init__(
        self,
        errand: Errand,
        context: GatewayContext,
        handover: Handover,
        reason: str,
        *,
        body: bytes,
        request_id: bytes,
    ) -> None:
        """`body` is cut already, see `first_half`."""
        self._errand = errand
        self._context = context
        self.handover = handover
        self.booking = handover.booking
        self.reason = reason
        self.outcome = "abandoned"
        self._asked = body
        self._request_id = request_id

    def stop(self) -> None:
        """Let go of all that is held: connection, booking, and blocks that nobody has fetched."""
        if self._stopped:
            return
        self._stopped = True
        self.let_go()
        self._context.release(self.booking, monotonic())
        if self.params and not self.is_taken:
            release(self._context, self.booking.replica.id, self.params)

    # --- Reach

    @property
    def _has_begun(self) -> bool:
        return self._head is not None

    def _request(self, target: Target) -> bytes:
        return self._errand.request_to(target, self._asked, self._request_id)

    def _lost(self, reason: str, *, suspend: bool = False) -> None:
        self._errand.prefill_failed(reason, suspend=suspend)

    # --- upstream.Receiver

    def upstream_head(self, head: ResponseHead) -> None:
        self._head = head

    def upstream_body(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > MAX_ANSWER_BYTES:
            self._errand.prefill_failed(f"its answer is over {MAX_ANSWER_BYTES} bytes")

    def upstream_event(self, framed: bytes, start: int) -> None:
        self.upstream_body(framed[start:-2])

    def upstream_flush(self) -> None:
        pass

    def upstream_complete(self) -> None:
        self._connection = None
        head = self._head
        assert head is not None
        if 400 <= head.status < 500:
            self.outcome = "refused"
            self._errand.prefill_refused(head, self._body)
            return
        if head.status != 200:
            self._errand.prefill_failed(f"it answered {head.status}")
            return
        try:
            params = bytes(_decode_prefilled(self._body).kv_transfer_params)
        except msgspec.DecodeError as error:
            self._errand.prefill_failed(f"its answer cannot be read: {error}")
            return
        self._body = self._asked = b""
        # Without them the engine kept nothing: whoever decodes computes the prompt again.
        self.params = b"" if params == b"null" else params
        self.is_done = True
        now_s = monotonic()
        self._context.answered(self.booking, now_s)
        self._context.release(self.booking, now_s)
        self._errand.prefilled()


class _Ignored:
    """A receiver for an answer that nobody waits for."""

    def upstream_head(self, head: ResponseHead) -> None:
        pass

    def upstream_body(self, data: bytes) -> None:
        pass

    def upstream_event(self, framed: bytes, start: int) -> None:
        pass

    def upstream_complete(self) -> None:
        pass

    def upstream_flush(self) -> None:
        pass

    def upstream_lost(self, reason: str) -> None:
        pass


def release(context: GatewayContext, replica_id: ReplicaId, params: bytes) -> None:
    """Tell a replica to free the blocks that `params` name. Returns at once; where it fails their lease frees them."""
    try:
        request_id = _decode_held(params).remote_request_id
    except msgspec.DecodeError:
        return
    target = context.targets.get(replica_id)
    if request_id is None or target is None:
        return
    body = msgspec.json.encode({"request_ids": [request_id]})
    request = b"POST %b HTTP/1.1\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        RELEASE_PATH.encode(),
        target.prefix,
        len(body),
        body,
    )
    task = context.loop.create_task(_tell(context, target, request))
    context.releasing.add(task)
    task.add_done_callback(context.releasing.discard)


async def _tell(context: GatewayContext, target: Target, request: bytes) -> None:
    try:
        connection = context.pool.take(target) or await context.pool.connect(target)
        connection.send(_Ignored(), request)
    except OSError as error:
        log.info("blocks on %s are left to their lease: %s", target.host, error)
