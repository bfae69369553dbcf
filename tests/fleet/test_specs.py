"""From the configuration to single replicas."""

from headrace.config import parse
from headrace.fleet.specs import Device, expand, slug


def config(**pool: object) -> object:
    return parse({"models": [{"name": "m", "source": "org/m", "pools": [pool]}]})


def ids(specs: object) -> list[str]:
    return [spec.id for spec in specs]


def test_every_replica_of_every_pool_gets_an_id_that_names_it() -> None:
    both = parse(
        {
            "models": [
                {
                    "name": "m",
                    "source": "org/m",
                    "pools": [{"role": "prefill", "replicas": 1}, {"role": "decode", "replicas": 2}],
                },
                {"name": "s", "backend": "simulated"},
            ]
        }
    )
    assert ids(expand(both, 4, 0)) == ["m-prefill-0", "m-decode-0", "m-decode-1", "s-unified-0"]


def test_per_core_stops_at_two_and_starts_at_one() -> None:
    counts = [len(expand(config(replicas="per_core"), cores, 0)) for cores in (0, 1, 2, 64)]
    assert counts == [1, 1, 2, 2]


def test_auto_means_gpus_where_there_are_some() -> None:
    assert expand(config(), 2, 0)[0].device is Device.CPU
    (spec,) = expand(config(tensor_parallel=2), 2, 8)
    assert (spec.device, spec.num_gpus) == (Device.CUDA, 2)


def test_simulated_replicas_take_no_cores_and_external_ones_are_not_ours_to_start() -> None:
    mixed = parse(
        {
            "models": [
                {"name": "s", "backend": "simulated", "pools": [{"replicas": 16}]},
                {"name": "e", "backend": "external", "urls": ["http://127.0.0.1:1"]},
            ]
        }
    )
    specs = expand(mixed, 1, 0)
    assert len(specs) == 16
    assert {(spec.cpus, spec.device, spec.num_gpus) for spec in specs} == {(0.0, Device.NONE, 0)}


def test_a_simulated_replica_on_cuda_takes_as_many_gpus_as_a_real_one() -> None:
    pool = {"device": "cuda", "tensor_parallel": 2}
    (spec,) = expand(parse({"models": [{"name": "s", "backend": "simulated", "pools": [pool]}]}), 1, 8)
    assert (spec.device, spec.num_gpus, spec.cpus) == (Device.CUDA, 2, 0.0)


def test_model_names_that_differ_never_share_a_slug() -> None:
    names = ["a-b", "a/b", "a b", "a:b", "a--b"]
    assert len({slug(name) for name in names}) == len(names)
    assert slug("smollm2") == "smollm2"
    assert all("/" not in slug(name) for name in names)
