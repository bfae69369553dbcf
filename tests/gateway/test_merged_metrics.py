"""Metrics of several processes as those of one."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.gateway.merged_metrics import Family, Sample, collect, merge, render
from headrace.gateway.metrics import GatewayMetrics
from headrace_router.policies import make_policy
from headrace_router.router import Router
from headrace_router.types import BootId, Endpoints, Membership, Replica, ReplicaId, Role


def family(name: str, kind: str, **values: float) -> Family:
    return Family(
        name, "", kind, [Sample(name, (("model", label),), value) for label, value in values.items()]
    )


def values(families: list[Family]) -> dict[tuple[str, str], float]:
    return {
        (sample.name, dict(sample.labels)["model"]): sample.value for f in families for sample in f.samples
    }


def test_counters_add_up_and_what_the_dead_have_counted_stays() -> None:
    alive = [[family("c", "counter", a=1, b=2)], [family("c", "counter", a=10)]]
    dead = [family("c", "counter", a=100), family("g", "gauge", a=5)]
    assert values(merge(alive, dead)) == {("c", "a"): 111, ("c", "b"): 2}


def test_gauges_add_up_unless_they_say_the_same_of_the_fleet() -> None:
    parts = [
        [
            family("headrace_requests_in_flight", "gauge", a=use),
            family("headrace_replica_kv_use", "gauge", a=use / 8),
        ]
        for use in (2.0, 4.0)
    ]
    merged = values(merge(parts))
    assert merged == {("headrace_requests_in_flight", "a"): 6.0, ("headrace_replica_kv_use", "a"): 0.5}


def test_what_every_process_hears_from_the_fleet_counts_once() -> None:
    parts = [[family("headrace_kv_feed", "counter", a=count)] for count in (7.0, 8.0)]
    assert values(merge(parts)) == {("headrace_kv_feed", "a"): 8.0}


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["count", "die"]), st.integers(0, 5)), max_size=40)
)
def test_a_sum_never_goes_down_whoever_dies(steps: list[tuple[int, str, int]]) -> None:
    counts = [0.0, 0.0, 0.0]
    ended: list[Family] = []
    last = 0.0
    for number, what, count in steps:
        if what == "die":
            ended = merge([ended], [family("c", "counter", m=counts[number])])
            counts[number] = 0.0
        else:
            counts[number] += count
        total = values(merge([[family("c", "counter", m=one)] for one in counts], ended))[("c", "m")]
        assert total >= last
        last = total


def gateway() -> GatewayMetrics:
    router = Router(make_policy("round_robin", 0))
    replica = Replica(ReplicaId("r"), BootId("b"), "m", Role.UNIFIED, Endpoints("http://x"))
    router.set_membership(Membership(1, (replica,)), 0.0)
    metrics = GatewayMetrics(router)
    metrics.of("m").in_flight = 1
    metrics.of("m").finish(200, "", 0.2, None)
    metrics.of("m").finish(503, "NoReplica", 7.0, None)
    return metrics


def test_of_one_gateway_nothing_changes_and_of_three_all_is_three_times() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(gateway())
    alone = collect(registry)
    assert render(merge([alone])) == generate_latest(registry)
    text = render(merge([alone, alone, alone])).decode()
    assert 'headrace_requests_total{error="",model="m",status="200"} 3.0' in text
    assert 'headrace_request_duration_seconds_bucket{le="0.5",model="m"} 3.0' in text
    assert 'headrace_request_duration_seconds_count{model="m"} 6.0' in text
    assert 'headrace_replica_up{model="m",replica="r"} 1.0' in text
