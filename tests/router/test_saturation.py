"""When a replica can take one more request without making it wait."""

from __future__ import annotations

from headrace_router.disaggregation import make_disaggregation
from headrace_router.load_table import SETTLE_S, LoadTable, ReplicaLoad
from headrace_router.policies import make_policy
from headrace_router.router import Router
from headrace_router.saturation import SaturationBound, all_saturated, is_saturated
from headrace_router.types import BootId, Endpoints, LoadReport, Membership, Replica, ReplicaId, Request, Role


def loads_of(
    *names: str, num_blocks: int | None = 1000, max_running: int | None = None
) -> tuple[LoadTable, list[ReplicaLoad]]:
    """Replicas with 16,000 tokens of KV cache each."""
    table = LoadTable()
    endpoints = Endpoints("http://127.0.0.1:1", load="tcp://127.0.0.1:2")
    table.replace(
        tuple(
            Replica(
                ReplicaId(name), BootId("1"), "m", Role.UNIFIED, endpoints,
                block_size=None if num_blocks is None else 16, num_blocks=num_blocks, max_running=max_running,
            )
            for name in names
        ),
        0.0,
    )  # fmt: skip
    return table, table.all()


def reported(
    table: LoadTable,
    running: int,
    *,
    waiting: int = 0,
    backlog: int = 0,
    kv_use: float = 0.0,
    now_s: float = 0.0,
) -> None:
    (load, *_) = table.all()
    sequence = 1 if load.last_report is None else load.last_report.sequence + 1
    table.report(LoadReport(ReplicaId("a"), BootId("1"), sequence, running, waiting, kv_use, backlog), now_s)


def test_an_idle_replica_is_never_saturated_however_large_the_prompt() -> None:
    _, (load,) = loads_of("a")
    assert not is_saturated(load, 10**9)


def test_many_running_requests_alone_saturate_nothing() -> None:
    table, (load,) = loads_of("a")
    reported(table, running=200, kv_use=0.5)
    assert not is_saturated(load, 1000)


def test_a_predicted_wait_beyond_the_bound_saturates() -> None:
    table, (load,) = loads_of("a")
    reported(table, running=1, backlog=1000)
    wait_s = load.wait_s
    assert wait_s > 0
    assert is_saturated(load, 10, SaturationBound(wait_s=wait_s / 2))
    assert not is_saturated(load, 10, SaturationBound(wait_s=wait_s * 2))


def test_what_was_booked_since_the_report_counts() -> None:
    table, (load,) = loads_of("a")
    reported(table, running=1)
    bound = SaturationBound(wait_s=load.cost_model.seconds_per_token(1, 0.0) * 500)
    assert not is_saturated(load, 10, bound)
    booking = table.book(load, 4000, 4000, now_s=1.0)
    assert is_saturated(load, 10, bound)
    table.release(booking, 2.0)
    assert not is_saturated(load, 10, bound)


def test_a_prompt_that_would_take_the_memory_that_answers_grow_in_saturates() -> None:
    table, (load,) = loads_of("a")
    reported(table, running=8, kv_use=0.8)  # 3,200 tokens free, of which 800 are kept
    assert not is_saturated(load, 2300)
    assert is_saturated(load, 2500)


def test_a_server_that_tells_nothing_of_its_memory_is_judged_by_its_wait_alone() -> None:
    table, (load,) = loads_of("a", num_blocks=None)
    reported(table, running=8, kv_use=1.0)
    assert not is_saturated(load, 10**6)


def test_a_request_waits_only_when_no_replica_is_free_or_there_is_none() -> None:
    table, loads = loads_of("a", "b")
    reported(table, running=8, kv_use=1.0)
    assert is_saturated(loads[0], 100)
    assert not all_saturated(loads, 100)
    assert all_saturated(loads[:1], 100)
    assert all_saturated([], 100)


def test_a_server_that_reports_nothing_is_never_saturated() -> None:
    table = LoadTable()
    table.replace(
        (Replica(ReplicaId("a"), BootId("1"), "m", Role.UNIFIED, Endpoints("http://127.0.0.1:1")),), 0.0
    )
    (load,) = table.all()
    table.book(load, 10**6, 10**6, now_s=0.0)
    assert load.wait_s > 1
    assert not is_saturated(load, 10)


def test_a_prompt_larger_than_half_the_cache_needs_half_of_it_free() -> None:
    table, (load,) = loads_of("a")
    reported(table, running=1, kv_use=0.4)  # 9,600 of 16,000 tokens free
    assert not is_saturated(load, 15_000)
    reported(table, running=1, kv_use=0.5)
    assert is_saturated(load, 15_000)


# --- places of the batch


def test_a_batch_without_a_place_saturates_when_one_in_eight_waits_already() -> None:
    table, (load,) = loads_of("a", max_running=16)
    reported(table, running=16)
    assert not is_saturated(load, 10), "a place that comes free finds somebody in the engine"
    reported(table, running=16, waiting=1)
    assert not is_saturated(load, 10)
    reported(table, running=16, waiting=2)
    assert load.wait_s == 0
    assert is_saturated(load, 10)
    reported(table, running=15, waiting=2)
    assert not is_saturated(load, 10)


def test_what_was_booked_since_the_report_takes_places_and_gives_them_back() -> None:
    table, (load,) = loads_of("a", max_running=4)
    reported(table, running=3)
    bookings = [table.book(load, 10, 10, now_s=1.0) for _ in range(2)]
    assert is_saturated(load, 10)
    table.answered(bookings[0], 1.1)
    assert is_saturated(load, 10), "it runs, though no report shows it yet"
    reported(table, running=4, waiting=1, now_s=2.0)
    assert is_saturated(load, 10)
    table.release(bookings[0], 3.0)
    reported(table, running=4, now_s=3.0)
    assert not is_saturated(load, 10)
    table.check_integrity()


def test_a_request_that_a_report_shows_before_it_must_takes_one_place() -> None:
    table, (load,) = loads_of("a", max_running=4)
    reported(table, running=0)
    for _ in range(4):
        table.book(load, 10, 10, now_s=1.0)
    reported(table, running=4, now_s=1.0 + SETTLE_S / 2)
    assert load.unreported == 4
    assert not is_saturated(load, 10)


def test_another_gateways_requests_take_places() -> None:
    table, (load,) = loads_of("a", max_running=4)
    reported(table, running=4)
    assert not is_saturated(load, 10)
    table.booked_elsewhere("a", "1", 10, 1.0)
    assert is_saturated(load, 10)
    reported(table, running=4, now_s=2.0)
    assert not is_saturated(load, 10)
    booking = table.book(load, 10, 10, now_s=3.0)
    assert is_saturated(load, 10)
    reported(table, running=4, waiting=1, now_s=4.0)
    assert is_saturated(load, 10)
    table.release(booking, 5.0)
    assert not is_saturated(load, 10)


def test_a_client_that_reads_slowly_holds_no_place() -> None:
    table, (load,) = loads_of("a", max_running=4)
    bookings = [table.book(load, 10, 10, now_s=1.0) for _ in range(5)]
    assert is_saturated(load, 10)
    for booking in bookings:
        table.answered(booking, 1.5)
    reported(table, running=0, now_s=2.0)
    assert load.requests == 5
    assert not is_saturated(load, 10)


def test_where_nobody_told_the_number_of_places_they_are_never_short() -> None:
    table, (load,) = loads_of("a")
    reported(table, running=10_000, waiting=10_000, kv_use=0.5)
    assert not is_saturated(load, 10)
    assert load.turn_s == load.wait_s


def test_the_next_request_begins_when_as_many_places_have_come_free_as_requests_wait() -> None:
    table, (load,) = loads_of("a", max_running=4)
    reported(table, running=3)
    assert load.turn_s == 0
    reported(table, running=4)
    first_s = load.turn_s
    assert first_s == load.residence_s / 4
    table.book(load, 10, 0, now_s=1.0)
    assert load.turn_s == 2 * first_s
    reported(table, running=4, waiting=1, backlog=10**6, now_s=2.0)
    assert load.turn_s == load.wait_s > 2 * first_s


# --- ways through a fleet whose replicas hand over


def router_of(disaggregation: str, **roles: Role) -> Router:
    router = Router(
        make_policy("delay", 0), disaggregation=make_disaggregation(disaggregation, "delay", 0, 1000)
    )
    endpoints = Endpoints("http://127.0.0.1:1", load="tcp://127.0.0.1:2")
    replicas = [
        Replica(
            ReplicaId(name),
            BootId("1"),
            "m",
            role,
            endpoints,
            block_size=16,
            num_blocks=1000,
            max_running=8,
            kv_connector="N",
        )
        for name, role in roles.items()
    ]
    router.set_membership(Membership(1, tuple(replicas)), 0.0)
    return router


def busy(
    router: Router,
    name: str,
    sequence: int = 1,
    *,
    running: int = 1,
    backlog: int = 10**6,
    kv_use: float = 0.0,
) -> None:
    router.report(LoadReport(ReplicaId(name), BootId("1"), sequence, running, 0, kv_use, backlog), 0.0)


HANDED = Request("m", prompt_tokens=2000, can_hand_over=True)
BOUND = SaturationBound()


def test_a_request_that_may_be_handed_over_goes_any_way_that_is_open() -> None:
    router = router_of("per_request", p=Role.PREFILL, d=Role.DECODE)
    assert router.has_room(HANDED, BOUND)
    busy(router, "p")
    assert router.has_room(HANDED, BOUND), "d computes the prompt itself"
    busy(router, "d")
    assert router.has_room(HANDED, BOUND) is False
    busy(router, "p", 2, backlog=0)
    assert router.has_room(HANDED, BOUND) is False, "what waits on d takes its memory"
    busy(router, "d", 2, backlog=9000)
    assert router.has_room(HANDED, BOUND), "d's own queue does not hold up who comes computed"
    busy(router, "d", 3, backlog=9000, kv_use=0.5)
    assert router.has_room(HANDED, BOUND) is False, "no memory on d"
    busy(router, "d", 4, backlog=0, running=9)
    assert router.has_room(HANDED, BOUND) is False, "no place on d"


def test_always_remote_waits_for_a_replica_that_computes_prompts() -> None:
    router = router_of("always_remote", p=Role.PREFILL, d=Role.DECODE)
    assert router.has_room(HANDED, BOUND)
    busy(router, "p")
    assert router.has_room(HANDED, BOUND) is False
    assert router.has_room(HANDED._replace(can_hand_over=False), BOUND), "it runs on d alone"


def test_a_threshold_decides_which_side_must_be_free() -> None:
    router = router_of("threshold", p=Role.PREFILL, d=Role.DECODE)
    busy(router, "p")
    assert router.has_room(HANDED._replace(prompt_tokens=500), BOUND)
    assert router.has_room(HANDED, BOUND) is False


def test_never_remote_asks_only_those_that_answer() -> None:
    router = router_of("never_remote", p=Role.PREFILL, d=Role.DECODE)
    busy(router, "d")
    assert router.has_room(HANDED, BOUND) is False


def test_replicas_already_tried_do_not_count_as_room() -> None:
    router = router_of("per_request", a=Role.UNIFIED, b=Role.UNIFIED)
    busy(router, "b")
    request = Request("m", prompt_tokens=100)
    assert router.has_room(request, BOUND)
    assert router.has_room(request._replace(excluded=frozenset({ReplicaId("a")})), BOUND) is False
    everyone = frozenset({ReplicaId("a"), ReplicaId("b")})
    assert router.has_room(request._replace(excluded=everyone), BOUND) is None
    assert router.has_room(Request("other"), BOUND) is None
