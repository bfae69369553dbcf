"""vLLM's statistics, as values with the fields that the meter reads."""

from types import SimpleNamespace as Stats

from headrace.backends.load_meter import LoadMeter
from headrace_router.types import BootId, Iteration, ReplicaId, Transfer


def step(running: int = 1, prefill: int = 0, decodes: int = 0, hits: int = 0, ms: float = 100.0) -> Stats:
    return Stats(
        num_running_reqs=running,
        kv_cache_usage=0.25,
        prefix_cache_stats=Stats(hits=hits),
        connector_prefix_cache_stats=None,
        iteration_details=Stats(
            num_ctx_tokens=prefill, num_generation_requests=decodes, elapsed_ms=ms, is_dummy=False
        ),
    )


def first_tokens(prompt: int, cached: int = 0, gaps_s: tuple[float, ...] = ()) -> Stats:
    return Stats(
        prompt_token_stats=Stats(total=prompt, cached_tokens=cached),
        num_generation_tokens=1,
        num_preempted_reqs=0,
        inter_token_latencies_iter=list(gaps_s),
    )


def meter() -> LoadMeter:
    return LoadMeter(ReplicaId("r"), BootId("b"))


def test_a_request_the_scheduler_has_not_seen_is_waiting_with_its_whole_prompt() -> None:
    report = meter().report(unfinished=1, prefilling_tokens=1000)
    assert (report.running, report.waiting, report.backlog_tokens) == (0, 1, 1000)


def test_the_backlog_falls_as_chunks_are_computed_and_hits_found() -> None:
    load = meter()
    load.record(step(prefill=512, hits=200), None)
    assert load.report(1, 1000).backlog_tokens == 288
    load.record(step(prefill=288), first_tokens(1000, cached=200))
    report = load.report(1, 0)
    assert (report.backlog_tokens, report.prompt_tokens_total, report.cached_tokens_total) == (0, 1000, 200)
    assert load.report(2, 700).backlog_tokens == 700, "the next prompt starts from nothing"


def test_an_aborted_prompt_leaves_no_credit_behind() -> None:
    load = meter()
    load.record(step(prefill=512), None)
    assert load.report(0, 0).backlog_tokens == 0
    assert load.report(1, 300).backlog_tokens == 300


def test_the_scheduler_is_not_believed_about_requests_that_have_left() -> None:
    load = meter()
    load.record(step(running=3), None)
    report = load.report(unfinished=0, prefilling_tokens=0)
    assert (report.running, report.waiting, report.kv_use) == (0, 0, 0.0)


def test_iterations_are_told_once() -> None:
    load = meter()
    load.record(step(prefill=512, decodes=3, ms=250), None)
    assert load.report(1, 0).iterations == (Iteration(0.25, 512, 3),)
    assert load.report(1, 0).iterations == ()


def test_a_step_takes_as_long_as_lies_between_two_tokens_of_one_sequence() -> None:
    load = meter()
    load.record(step(decodes=2, ms=100), first_tokens(0, gaps_s=(0.112, 0.131)))
    load.record(step(decodes=1, ms=100), first_tokens(0, gaps_s=(0.5,)))  # it had skipped steps
    load.record(step(prefill=64, ms=100), first_tokens(64))
    assert [one.duration_s for one in load.report(2, 0).iterations] == [0.112, 0.1, 0.1]


def test_a_step_attends_to_what_the_batch_holds() -> None:
    load = meter()
    load.capacity_tokens = 4000
    load.record(step(prefill=100, decodes=3), None)
    assert load.report(3, 0).iterations == (Iteration(0.1, 100, 3, 900),)


def received(tokens: int, sizes: list[int], durations_s: list[float]) -> Stats:
    stats = step()
    stats.connector_prefix_cache_stats = Stats(hits=tokens)
    stats.kv_connector_stats = {"transfer_duration": durations_s, "bytes_transferred": sizes}
    return stats


def test_transfers_are_told_once_and_in_tokens() -> None:
    load = meter()
    load.record(received(300, [2000, 1000], [0.02, 0.01]), None)
    assert load.report(1, 0).transfers == (Transfer(200, 0.02), Transfer(100, 0.01))
    assert load.report(1, 0).transfers == ()


def test_transfers_are_found_within_a_multi_connector() -> None:
    load = meter()
    stats = received(100, [], [])
    stats.kv_connector_stats = {
        "OffloadingConnector": {"data": {"gpu_to_cpu": []}},
        "NixlConnector": {"data": {"transfer_duration": [0.5], "bytes_transferred": [800]}},
    }
    load.record(stats, None)
    assert load.report(1, 0).transfers == (Transfer(100, 0.5),)


def test_blocks_held_for_another_replica_count_after_their_request_has_ended() -> None:
    load = LoadMeter(ReplicaId("r"), BootId("b"), holds_blocks=True)
    load.record(step(running=0), None)
    assert load.report(0, 0).kv_use == 0.25
