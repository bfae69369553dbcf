"""One gateway without a socket: its router, its feeds, its clockwork, its end. Two faces stand before it: `server` and
Ray Serve's ingress."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from headrace.config import Gateway
from headrace.gateway.access_log import AccessLog
from headrace.gateway.context import GatewayContext
from headrace.gateway.demand import DemandMeter, DemandSink, DemandTeller
from headrace.gateway.feeds import FleetFeed, MembershipSource
from headrace.gateway.following import news
from headrace.gateway.settings import SETTINGS_FAILED, GatewaySettings, SettingsSource
from headrace.gateway.timed_router import TimedRouter
from headrace_router.disaggregation import Disaggregation, make_disaggregation
from headrace_router.policies import make_policy
from headrace_router.view import Policy

if TYPE_CHECKING:
    from headrace.gateway.prefixes import Prefixes, TokenizerSource

log = logging.getLogger(__name__)

TICK_S = 0.1


class GatewayCore:
    """`start`, then `stop`, which is safe at any time and twice. `context` stands between the two."""

    def __init__(
        self,
        settings: GatewaySettings,
        source: MembershipSource,
        *,
        changes: SettingsSource | None = None,
        demand: DemandSink | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`changes` tells of other settings, and `changed` is called after each. `demand`: who wants to know of the
        work that comes."""
        self._settings = settings
        self._source = source
        self._changes = changes
        self._changed = changed
        self._demand = demand
        self._feed: FleetFeed | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.context: GatewayContext | None = None

    @property
    def is_ticking(self) -> bool:
        """Whether timeouts, silences and the logs are looked after."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    async def prepare(self, internal_token: str | None) -> GatewayContext:
        """Make the context. Nothing runs yet. `internal_token`: what the fleet's own replicas ask for."""
        loop = asyncio.get_running_loop()
        settings, config = self._settings, self._settings.gateway
        policy, disaggregation = _deciders(config)
        prefixes = await self._prefixes(loop) if policy.reads_prefixes else None
        router = TimedRouter(
            policy,
            disaggregation=disaggregation,
            index=None if prefixes is None else prefixes.index,
            texts=None if prefixes is None else prefixes.texts,
        )
        self.context = GatewayContext(
            config,
            router,
            loop,
            prefixes=prefixes,
            authorization=None if internal_token is None else f"Bearer {internal_token}".encode(),
            dead_after_s=settings.dead_after_s,
            access_log=AccessLog(sys.stderr.buffer) if config.access_log else None,
            weights=settings.weights,
        )
        return self.context

    async def start(self) -> None:
        """Follow the fleet. Returns once the first membership is known. `prepare` comes first."""
        context = self.context
        assert context is not None, "prepare() comes first"
        self._feed = FleetFeed(context, self._source)
        self._feed.start()
        await self._feed.first.wait()
        if context.prefixes is not None:
            await context.prefixes.loaded()
        self._tasks.append(context.loop.create_task(self._tick()))
        self._tasks.append(context.loop.create_task(self._write_log()))
        if self._changes is not None:
            self._tasks.append(context.loop.create_task(self._follow_settings(self._changes)))
        if self._demand is not None:
            meter = DemandMeter(context.router, context.metrics, context.admission)
            teller = DemandTeller(meter, context.admission, self._demand)
            self._tasks.append(context.loop.create_task(teller.run()))

    async def take(self, settings: GatewaySettings) -> None:
        """Go by these settings from now on. Requests under way keep what they have begun with."""
        context = self.context
        assert context is not None, "prepare() comes first"
        old, config = self._settings.gateway, settings.gateway
        self._settings = settings
        context.go_by(config, settings.dead_after_s, settings.weights)
        if config.access_log != (context.access_log is not None):
            self._flush_log()
            context.access_log = AccessLog(sys.stderr.buffer) if config.access_log else None
        if context.prefixes is not None:
            context.prefixes.take_tokenizers(_sources(settings.tokenizers))
        if _decided_by(config) != _decided_by(old):
            policy, disaggregation = _deciders(config)
            if policy.reads_prefixes and context.prefixes is None:
                prefixes = await self._prefixes(context.loop)
                context.know_prefixes(prefixes)
            context.router.decide_by(policy, disaggregation)
        self._changed()

    async def _follow_settings(self, source: SettingsSource) -> None:
        async for settings in news(source.settings, SETTINGS_FAILED):
            try:
                await self.take(settings)
            except Exception as error:  # supervision boundary: the gateway serves on as it is
                log.warning("settings could not be taken, serving on by the last ones: %s", error)

    async def _prefixes(self, loop: asyncio.AbstractEventLoop) -> Prefixes:
        # Imported here: it brings numba, and a gateway that only balances load starts without.
        from headrace.gateway.prefixes import Prefixes

        return Prefixes(loop, _sources(self._settings.tokenizers))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.tick()
            except Exception:  # supervision boundary: one bad tick must not end all timeouts
                log.exception("the gateway's tick failed")

    def tick(self) -> None:
        """What is due a few times a second."""
        context, feed = self.context, self._feed
        assert context is not None and feed is not None
        feed.drain()
        context.expire()
        if context.prefixes is not None:
            context.prefixes.tick()

    async def _write_log(self) -> None:
        """A reader of the log that stalls holds up this task and its thread, nothing else."""
        while True:
            await asyncio.sleep(TICK_S)
            access_log = None if self.context is None else self.context.access_log
            if access_log is not None and (text := access_log.take()):
                await asyncio.to_thread(access_log.put, text)

    def _flush_log(self) -> None:
        access_log = None if self.context is None else self.context.access_log
        if access_log is not None:
            access_log.put(access_log.take())

    def cut(self) -> None:
        """End every exchange under way, with an error."""
        if self.context is not None:
            for exchange in list(self.context.active):
                exchange.cut()

    async def stop(self) -> None:
        """Cut what runs and release everything."""
        context = self.context
        if context is None:
            return
        context.draining = True
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._feed is not None:
            await self._feed.stop()
        if context.prefixes is not None:
            context.prefixes.stop()
        context.pool.close()
        self._flush_log()
        self.context = None


def _decided_by(config: Gateway) -> tuple[object, ...]:
    return config.policy, config.disaggregation, config.seed, config.remote_threshold_tokens


def _deciders(config: Gateway) -> tuple[Policy, Disaggregation]:
    return make_policy(config.policy, config.seed), make_disaggregation(
        config.disaggregation, config.policy, config.seed, config.remote_threshold_tokens
    )


def _sources(tokenizers: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Mapping[str, TokenizerSource]:
    from headrace.gateway.prefixes import TokenizerSource

    return {name: TokenizerSource(*source) for name, source in tokenizers.items()}
