"""The configuration: one frozen tree, read from one YAML file.

    Config
    ├── fleet      name, placement and life of the replicas
    ├── models[]   a served name, where its weights are, its backend, its pools
    │   ├── pools[]      role, replica count, autoscaling, devices, engine arguments
    │   └── kv_transfer  how its replicas hand KV blocks to each other
    ├── gateway    address, routing policy, limits, timeouts, the queue
    └── tenants[]  who shares the fleet, and in which parts; whose GPUs are whose

Defaults stand here and nowhere else. `load` reads a file, `parse` takes a mapping, `node` takes one branch; all
raise `ConfigError` with every problem found, one per line. Nothing is read from the environment.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from headrace.backends.kv_connectors import NIXL
from headrace.backends.ports import PortRange
from headrace.config_autoscale import Autoscale
from headrace.config_file import ConfigFile
from headrace.config_problems import Problem, describe
from headrace.config_tenants import QuotaSettings, SimulatedNode, Tenant
from headrace.config_tree import Lenient, Tree
from headrace.errors import ConfigError
from headrace_router.types import Role


class Pool(Tree):
    """The replicas of one model in one role."""

    role: Annotated[Role, Lenient] = Role.UNIFIED
    replicas: Annotated[int, Field(ge=0, le=4096)] | Literal["per_core"] = Field(
        1,
        description="How many; `per_core`: one per CPU core, at most 2. With `autoscale` it is how many there are at "
        "first, by default min_replicas.",
    )
    autoscale: Autoscale | None = Field(None, description="Absent: the number stays.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="`auto`: cuda where there is a GPU. A simulated replica on cuda holds GPUs and leaves them alone.",
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs that share each layer of one replica.")
    pipeline_parallel: int = Field(
        1, ge=1, le=64, description="Groups of GPUs that share a replica's layers."
    )
    host_cache_gib: float | None = Field(
        None,
        gt=0,
        le=65536,
        description="Host memory of one replica for KV blocks that its cache evicts, GiB.",
    )
    cpus: float = Field(
        1.0, ge=0, le=1024, description="Cores of one replica; bound to it when whole and on CPU."
    )
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM engine arguments, by their Python names: `max_model_len: 4096`.",
    )
    tenant: str | None = Field(None, description="Whose GPUs its replicas take, where tenants share GPUs.")
    priority: int = Field(
        0, ge=-1000, le=1000, description="Among a tenant's pools; a lower number matters more."
    )
    accelerator: str | None = Field(
        None,
        min_length=1,
        description="Kind of its GPUs, by Ray's name: `H100`. By default any; with quotas the tenant's only kind.",
    )
    node_labels: dict[str, str] = Field(
        default_factory=dict,
        description="Of Ray's nodes: only on those with all of these labels. `{ray.io/accelerator-type: H100}`.",
    )


class SimulatedEngine(Tree):
    """Timing and size of a simulated engine. An iteration takes
    `step_s + prefill_token_s * prefill_tokens + decode_sequence_s * decode_sequences
    + context_token_s * context_tokens` seconds.
    """

    block_size: int = Field(16, ge=1, le=4096, description="Tokens per KV block.")
    num_blocks: int = Field(4096, ge=1, le=2**31, description="KV blocks of one replica.")
    max_batched_tokens: int = Field(
        2048, ge=1, le=2**31, description="Most tokens computed in one iteration."
    )
    max_running: int = Field(256, ge=1, le=65536, description="Most requests in the batch.")
    max_model_len: int = Field(32768, ge=1, le=2**31, description="Tokens, prompt and answer together.")
    step_s: float = Field(0.005, ge=0, le=60)
    prefill_token_s: float = Field(0.0000625, ge=0, le=1)
    decode_sequence_s: float = Field(0.0002, ge=0, le=1)
    context_token_s: float = Field(0.0, ge=0, le=1)
    transfer_token_s: float = Field(
        0.000005, ge=0, le=1, description="To receive a token's KV blocks from another replica."
    )
    kv_lease_s: float = Field(
        30.0,
        gt=0,
        le=86400,
        description="How long KV blocks are held for a replica that does not fetch them.",
    )
    start_s: float = Field(0.0, ge=0, le=3600, description="To start, as loading a model takes.")
    start_error: str = Field("", max_length=200, description="Why it does not start, as of a broken model.")
    wake_s: float = Field(0.5, ge=0, le=3600, description="To wake from sleep.")
    wakes_wrong: bool = Field(
        False, description="After sleep it answers otherwise than before, as an engine with broken weights."
    )


class KvTransfer(Tree):
    """How replicas of one model hand KV blocks to each other."""

    connector: str = Field(NIXL, min_length=1, description="vLLM's name of it.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="The rest of vLLM's kv_transfer_config, by its own names: `kv_buffer_device: cpu`.",
    )


class Model(Tree):
    """One served model."""

    name: str = Field(min_length=1, max_length=256, description="What clients send as `model`.")
    backend: Literal["vllm", "simulated", "external"] = "vllm"
    source: str = Field(
        "embedded", min_length=1, description="`embedded`, a folder, or a Hugging Face id. vLLM only."
    )
    pools: Annotated[tuple[Pool, ...], Lenient] = Field((Pool(),), min_length=1)
    kv_transfer: KvTransfer | None = Field(
        None, description="By default NixlConnector where a pool's role is prefill or decode, else none."
    )
    simulated: SimulatedEngine = SimulatedEngine()
    urls: Annotated[tuple[str, ...], Lenient] = Field(
        (), description="Servers that already run. External only."
    )
    api_key: str | None = Field(None, description="Sent to external servers instead of the client's own key.")

    @property
    def transfer(self) -> KvTransfer | None:
        """How its replicas hand over, None where they do not."""
        if self.kv_transfer is None and any(pool.role is not Role.UNIFIED for pool in self.pools):
            return KvTransfer()
        return self.kv_transfer


def _of_range_form(text: str) -> str:
    try:
        PortRange.parse(text)
    except ValueError:
        raise PydanticCustomError(
            "range_form", "not two ports as in 20000-20999, from 1024 to 65535"
        ) from None
    return text


class Fleet(Tree):
    """The replicas as a whole."""

    name: str = Field(
        "headrace",
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
        description="Lower-case letters, digits and hyphens.",
    )
    start_timeout_s: float = Field(600.0, gt=0, le=86400, description="Longest start of one replica.")
    drain_timeout_s: float = Field(30.0, ge=0, le=86400, description="What runs may finish for this long.")
    report_interval_s: float = Field(0.1, ge=0.01, le=10, description="Longest silence between load reports.")
    dead_after_s: float = Field(
        0.8, gt=0, le=60, description="Silence after which a replica leaves the view."
    )
    max_restart_backoff_s: float = Field(
        60.0, gt=0, le=3600, description="Longest wait before a replacement."
    )
    quota: QuotaSettings = QuotaSettings()
    node_timeout_s: float = Field(
        15.0,
        ge=2,
        le=3600,
        description="A node of the cluster that is not reached for so long is lost: its replicas start elsewhere.",
    )
    ports: Annotated[str, AfterValidator(_of_range_form)] | None = Field(
        None,
        description="`20000-20999`: TCP ports that replicas listen on, each on five at most. Absent: any.",
    )
    simulated_nodes: Annotated[tuple[SimulatedNode, ...], Lenient] = Field(
        (), description="Where simulated replicas share tensor_parallel * pipeline_parallel GPUs each."
    )

    @property
    def port_range(self) -> PortRange | None:
        return None if self.ports is None else PortRange.parse(self.ports)


class Limits(Tree):
    """Bounds on what a client may send."""

    head_bytes: int = Field(64 * 1024, ge=1024, le=1024 * 1024)
    body_bytes: int = Field(64 * 1024 * 1024, ge=1024, le=4 * 1024**3)
    json_depth: int = Field(128, ge=8, le=1000)


class Timeouts(Tree):
    """Seconds."""

    head_s: float = Field(
        10.0, gt=0, le=3600, description="From a request's first byte to the end of its head."
    )
    body_s: float = Field(60.0, gt=0, le=3600, description="Longest pause while the body arrives.")
    connect_s: float = Field(2.0, gt=0, le=60)
    first_byte_s: float = Field(
        600.0, gt=0, le=86400, description="From sending upstream to the first byte back."
    )
    idle_s: float = Field(300.0, gt=0, le=86400, description="Longest upstream silence within an answer.")
    client_stall_s: float = Field(600.0, gt=0, le=86400, description="Longest time a client may not read.")
    keep_alive_s: float = Field(75.0, gt=0, le=3600)


def _of_host_form(text: str) -> str:
    """Whether the name resolves is the machine's business; a scheme, a port or `127.0.0.256` never can."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        label = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
        is_name = re.fullmatch(rf"{label}(\.{label})*\.?", text) and len(text) <= 253
        if not is_name or re.fullmatch(r"[0-9.]+", text):
            raise PydanticCustomError("host_form", "not a host") from None
    return text


HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,63}$")]


class Queue(Tree):
    """Requests that wait in the gateway while every replica of their model is saturated. Bounds are of one model."""

    max_requests: int = Field(1024, ge=1, le=1_000_000)
    max_bytes: int = Field(256 * 1024 * 1024, ge=1024, le=64 * 1024**3, description="Of the bodies held.")
    max_wait_s: float = Field(
        60.0,
        gt=0,
        le=86400,
        description="Longest wait; a request that will not be served within it is refused.",
    )
    max_start_wait_s: float = Field(
        600.0, gt=0, le=86400, description="Longest wait where the model has no replica and one starts."
    )
    saturated_wait_s: float = Field(
        0.5, ge=0, le=3600, description="Predicted wait from which on a replica counts as saturated."
    )
    free_kv: float = Field(
        0.05, ge=0, le=0.5, description="Share of the KV cache kept free for running answers to grow in."
    )
    tenant_header: HeaderName = Field(
        "x-tenant-id", description="Names whose share a request is served from."
    )
    deadline_header: HeaderName = Field(
        "x-request-timeout", description="Seconds after which the client no longer wants an answer."
    )


class Gateway(Tree):
    """The HTTP front."""

    host: Annotated[str, AfterValidator(_of_host_form)] = Field(
        "127.0.0.1", description="Address to listen on: an IP address or a host name."
    )
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port.")
    processes: int = Field(1, ge=1, le=64, description="Gateway processes on one node that share the port.")
    nodes: Literal["here", "every"] | dict[str, str] = Field(
        "here",
        description="`every`: besides that of `headrace serve` a gateway on every other node of the cluster, at the "
        "same host and port; a mapping: on those with all of these labels.",
    )
    policy: Literal[
        "delay",
        "round_robin",
        "random",
        "least_loaded",
        "power_of_two",
        "session_affinity",
        "prefix_affinity",
        "sticky_until_saturated",
        "kv_blend",
        "block_cost",
    ] = "delay"
    disaggregation: Literal["per_request", "always_remote", "never_remote", "threshold"] = Field(
        "per_request", description="When another replica computes a prompt, where replicas can hand over."
    )
    remote_threshold_tokens: int = Field(
        2048, ge=0, le=2**31, description="Uncached prompt tokens above which `threshold` hands over."
    )
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    queue: Queue = Queue()
    retries: int = Field(
        2,
        ge=0,
        le=10,
        description="Other replicas tried before the first byte of an answer, besides those that take no connection.",
    )
    access_log: bool = True
    seed: int = Field(0, description="Of the policies that draw lots.")


class Config(Tree):
    """The whole configuration."""

    fleet: Fleet = Fleet()
    models: Annotated[tuple[Model, ...], Lenient] = Field(min_length=1)
    gateway: Gateway = Gateway()
    tenants: Annotated[tuple[Tenant, ...], Lenient] = Field(
        (), description="Those with a share of their own; others are served too, with a weight of 1 each."
    )

    @property
    def has_gpu_quotas(self) -> bool:
        return any(tenant.gpus for tenant in self.tenants)

    def accelerator_of(self, pool: Pool) -> str | None:
        """Kind of GPU that a pool takes: its own word, else the only kind that its tenant has; None: any."""
        kinds = [kind for tenant in self.tenants if tenant.name == pool.tenant for kind in tenant.gpus]
        return kinds[0] if pool.accelerator is None and len(kinds) == 1 else pool.accelerator


Node = TypeVar("Node", bound=Tree)


def load(path: str | Path) -> Config:
    """The configuration in a YAML file. A problem is told with the line and column where it stands."""
    file = ConfigFile.read(Path(path))
    config, problems = _validate(Config, file.value)
    if config is not None:
        problems = _contradictions(config)
    if problems or config is None:
        placed = sorted((file.position(problem.path), str(problem)) for problem in problems)
        raise ConfigError("\n".join(f"{path}:{line}:{column}: {text}" for (line, column), text in placed))
    return config


def parse(mapping: Mapping[str, Any]) -> Config:
    """The configuration in a mapping, as YAML would give it."""
    config = node(Config, mapping)
    if problems := _contradictions(config):
        raise ConfigError("\n".join(map(str, problems)))
    return config


def node(kind: type[Node], mapping: Mapping[str, Any], *, at: str = "") -> Node:
    """One branch of the tree, `at` the key path that messages name: `node(Gateway, {...}, at="gateway")`."""
    value, problems = _validate(kind, mapping)
    if value is None:
        prefix = f"{at}." if at else ""
        raise ConfigError("\n".join(f"{prefix}{problem}" for problem in problems))
    return value


def json_schema() -> dict[str, Any]:
    """A JSON schema for editors, committed as `configs/schema.json`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(),
        "title": "Headrace configuration",
    }


def _validate(kind: type[Node], value: object) -> tuple[Node | None, tuple[Problem, ...]]:
    try:
        return kind.model_validate(value), ()
    except ValidationError as error:
        return None, describe(kind, error)


def _contradictions(config: Config) -> tuple[Problem, ...]:
    # Imported here because it reads the tree's classes, and the tree has to stand before they can be read.
    from headrace.config_rules import contradictions

    return contradictions(config)
