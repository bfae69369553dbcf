"""The scale test's own parts at a small size: streams that ask again, a crowd of replicas, the page."""

import asyncio

from headrace.config import Gateway, SimulatedEngine
from headrace.gateway.merged_metrics import Family, Sample
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings
from headrace_bench.fixed_gateway import FixedMembership
from headrace_bench.scale_crowd import MODEL, Crowd
from headrace_bench.scale_report import Index, Measured, Reading, quantile_s, render, value
from headrace_bench.scale_streams import Streams

ENGINE = SimulatedEngine(block_size=16, num_blocks=512, step_s=0.01, prefill_token_s=1e-5)


async def test_streams_ask_again_until_they_are_stopped_and_the_index_knows_the_caches() -> None:
    crowd = Crowd()
    replicas = await crowd.start(0, 3, ENGINE.model_dump(), "here")
    settings = GatewaySettings(0, Gateway(port=0, access_log=False), dead_after_s=10)
    server = GatewayServer(settings, FixedMembership(replicas, (MODEL,)), internal_token="scale")
    _, port = server.bind()
    await server.start()
    try:
        streams = Streams(port, 6, prompt_tokens=96, shared_tokens=64, answer_tokens=5, spread_s=0.1)
        streams.start()
        async with asyncio.timeout(30):
            while streams.ended < 20:
                await asyncio.sleep(0.01)
        await streams.stop()
        assert (streams.open, streams.errors) == (0, 0)
        assert streams.events == 5 * streams.ended
        assert len(streams.ttft_s) == streams.ended
        resident, hashes = await crowd.cached()
        assert resident >= len(hashes) > 0
        context = server.context
        assert context is not None and context.prefixes is not None
        async with asyncio.timeout(10):
            while context.prefixes.index.num_blocks != resident:
                await asyncio.sleep(0.01)
    finally:
        await server.stop()
        await crowd.stop()


def test_a_quantile_is_the_bound_of_its_bucket() -> None:
    rows = [("0.1", 90.0), ("0.5", 99.0), ("+Inf", 100.0)]
    family = Family("h", "", "histogram", [Sample("h_bucket", (("le", le),), count) for le, count in rows])
    assert [quantile_s([family], "h", share) for share in (0.5, 0.95, 0.99, 1.0)] == [
        0.1,
        0.5,
        0.5,
        float("inf"),
    ]
    assert quantile_s([], "h", 0.5) == 0.0
    assert value([family], "h_bucket", le="0.5") == 99.0


def test_the_page_tells_of_indexes_that_do_not_agree() -> None:
    readings = tuple(
        Reading(float(at), (at * 10**8, 0), (10**8, 2 * 10**8), (50, 60), 10, at, 100 * at) for at in range(3)
    )
    measured = Measured("How.", 4, 1.0, readings, [[], []], [[], []], [[], []], Index(7, 5, (7, 6), 20.0))
    page = render(measured, [2.0, 2.5], 1)
    assert "7, 6: they had not agreed 20.0 s after the last token" in page
    assert "| CPU of each gateway, cores | 0.10, 0.00 |" in page
