"""What joins vLLM's workers (`worker_extension_cls`) where they hand blocks over.

Blocks that a prefilling engine holds for a hand-over which will not happen are freed at once. vLLM frees them when the
decoding engine has fetched them, or when their lease ends (30 s). Another engine may also decline them, but with one
decoding replica, and that one dead, there is no other; and an engine refuses to decline its own. So the lease ends now,
in the worker; vLLM logs and counts it as one that expired.

And on CPU, NIXL's progress thread sleeps between looks. Its Python API sets the pause to zero, whatever is asked: the
thread then spins, on the one core that the replica is bound to, and a token takes 65 ms instead of 34.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

QUALIFIED_NAME = f"{__name__}.KvRelease"


class KvRelease:
    """Mixed into vLLM's worker class; called by `collective_rpc`."""

    def headrace_release_kv(self, request_ids: list[str]) -> int:
        """End the leases of these requests; the engine's next step frees their blocks. Returns how many there were."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        if not has_kv_transfer_group():
            return 0
        group: Any = get_kv_transfer_group()
        ended = 0
        for connector in getattr(group, "_connectors", None) or [group]:
            leases = getattr(getattr(connector, "connector_worker", None), "_reqs_to_send", {})
            for request_id in request_ids:
                if request_id in leases:
                    leases[request_id] = 0.0
                    ended += 1
        return ended


PROGRESS_PAUSE_US = 1000


def pause_progress_thread() -> None:
    """Let NIXL agents that this process makes from now on pause between looks. Safe twice."""
    from vllm.distributed.nixl_utils import NixlWrapper

    if NixlWrapper is None:
        return
    binding: Any = sys.modules[NixlWrapper.__module__].nixlBind
    base: Any = binding.nixlAgentConfig
    if getattr(base, "is_patient", False):
        return

    def pause(config: Any, _asked_us: int) -> None:
        base.pthrDelay.fset(config, PROGRESS_PAUSE_US)

    patient = property(base.pthrDelay.fget, pause)
    binding.nixlAgentConfig = type("PatientConfig", (base,), {"pthrDelay": patient, "is_patient": True})


def _is_cpu_worker() -> bool:
    """vLLM imports this file in each worker, before the connector; others import it for its name alone."""
    if "vllm.v1.worker.worker_base" not in sys.modules or importlib.util.find_spec("nixl") is None:
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


if _is_cpu_worker():
    pause_progress_thread()
