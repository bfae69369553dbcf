"""How a simulated fleet hands prompts over: pools, the link between replicas, and who decides."""

from __future__ import annotations

import re
from dataclasses import dataclass

from headrace.errors import CallerError
from headrace_router.disaggregation import (
    DISAGGREGATIONS,
    PER_REQUEST,
    THRESHOLD_TOKENS,
    Disaggregation,
    make_disaggregation,
)
from headrace_router.types import Role

KV_TOKEN_BYTES = 163_840
"""Keys and values of one token: 80 layers of 8 heads of 128, in FP8, as the study's engine is meant."""

_LETTERS = {"P": Role.PREFILL, "D": Role.DECODE, "U": Role.UNIFIED}


@dataclass(frozen=True, slots=True)
class HandingOver:
    """Equal settings give equal runs. Every replica has one link, which carries one transfer at a time."""

    pools: str = ""  # `4P+4D`, `8U`; empty: all unified, any replica may take either half
    disaggregation: str = PER_REQUEST
    threshold_tokens: int = THRESHOLD_TOKENS
    bandwidth: float = 25e9  # bytes/s of a link
    kv_token_bytes: float = KV_TOKEN_BYTES
    latency_s: float = 0.005  # of a transfer, besides its bytes

    def __post_init__(self) -> None:
        if self.disaggregation not in DISAGGREGATIONS:
            raise CallerError(
                f"unknown disaggregation {self.disaggregation!r}; there are {', '.join(DISAGGREGATIONS)}"
            )
        if self.pools:
            self.roles(None)

    def roles(self, num_replicas: int | None) -> list[Role]:
        """Of each replica. Raises `CallerError` where the pools cannot be read or are not `num_replicas`."""
        if not self.pools:
            return [Role.UNIFIED] * (num_replicas or 0)
        roles: list[Role] = []
        for part in self.pools.upper().split("+"):
            match = re.fullmatch(r"\s*(\d{1,4})([PDU])\s*", part)
            if match is None:
                raise CallerError(f"pools {self.pools!r} cannot be read; write 4P+4D, 8U or 2P+2D+4U")
            roles += [_LETTERS[match[2]]] * int(match[1])
        if num_replicas is not None and len(roles) != num_replicas:
            raise CallerError(
                f"pools {self.pools} have {len(roles)} replicas, --replicas says {num_replicas}"
            )
        return roles

    def duration_s(self, tokens: int) -> float:
        """Of one transfer alone on its links."""
        return self.latency_s + tokens * self.kv_token_bytes / self.bandwidth

    def make(self, policy: str, seed: int) -> Disaggregation:
        """The decision, for a routing policy."""
        return make_disaggregation(self.disaggregation, policy, seed, self.threshold_tokens)
