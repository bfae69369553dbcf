"""vLLM's sleep mode, made safe: the memory that it gives back is measured, and what it answers afterwards is compared.

    sleep   probe, remember ── AsyncLLM.sleep(level) ── device memory free again?
    wake    AsyncLLM.wake_up ── level 2: weights read again ── probe: the same as before?

Level 1 keeps the weights in host memory, level 2 drops them and reads them again. Either forgets the prefix cache.
As vLLM 0.32 has it: `enable_sleep_mode` is refused on the CPU, and `sleep` without it pauses the engine, gives nothing
back and says nothing of it, so that only the measure tells.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from headrace.errors import SleepFailed

PROBE = (1, 2, 3, 4, 5, 6, 7)
"""Token ids of the probe's prompt. Every vocabulary has them, and they fill no block, so that no cache answers."""

LEAST_FREED = 0.5
"""Share of the memory in use that must be free afterwards. CUDA's context and graphs stay, some GB."""


Memory = Callable[[], tuple[int, int] | None]
"""Tells free and all bytes of the engine's devices, None where nobody can."""

Probe = Callable[[], Awaitable[tuple[int, ...]]]
"""Tells the token ids with which the engine continues one fixed prompt."""


class EngineSleep:
    """Of one engine on GPUs of its own. Whoever calls sees to it that nothing runs."""

    def __init__(self, engine: Any, level: int, memory: Memory, probe: Probe) -> None:
        self._engine = engine
        self._level = level
        self._memory = memory
        self._probe = probe
        self._expected: tuple[int, ...] = ()

    async def sleep(self) -> int:
        """Returns the bytes freed. Raises SleepFailed; the engine is then good for nothing but its end."""
        before = self._memory()
        if before is None:
            raise SleepFailed("the device's memory cannot be measured (no NVML), so nobody would know")
        self._expected = await self._probe()
        await self._engine.sleep(level=self._level)
        after = self._memory()
        freed, used = 0 if after is None else after[0] - before[0], before[1] - before[0]
        if freed < LEAST_FREED * used:
            raise SleepFailed(
                f"it sleeps and {freed / 2**30:.1f} GiB of the {used / 2**30:.1f} GiB in use became free; at least "
                f"{LEAST_FREED:.0%} should"
            )
        return freed

    async def wake(self) -> None:
        """Raises SleepFailed when it does not answer as before; likewise."""
        if self._level == 2:
            await self._engine.wake_up(tags=["weights"])
            await self._engine.collective_rpc("reload_weights")
            await self._engine.wake_up(tags=["kv_cache"])
        else:
            await self._engine.wake_up()
        found = await self._probe()
        if found != self._expected:
            raise SleepFailed(
                f"awake again, it continues a probe with token {list(found)}, not with {list(self._expected)} as before"
            )


async def greedy_token(engine: Any) -> tuple[int, ...]:
    """The token with which vLLM's engine continues the probe's prompt."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": list(PROBE)}
    token_ids: tuple[int, ...] = ()
    async for output in engine.generate(prompt, parameters, f"probe-{secrets.token_hex(4)}"):
        token_ids = tuple(output.outputs[0].token_ids)
    return token_ids
