"""The configuration: one frozen tree, read from one YAML file.

    Config
    ├── fleet      name, placement and life of the replicas
    ├── models[]   a served name, where its weights are, its backend, its pools
    │   └── pools[]    role, replica count, devices, engine arguments
    └── gateway    address, routing policy, limits, timeouts

Defaults stand here and nowhere else. `load` reads a file, `parse` takes a mapping; both raise `ConfigError`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace_router.types import Role


class Tree(BaseModel):
    """A frozen node that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Pool(Tree):
    """The replicas of one model in one role."""

    role: Role = Role.UNIFIED
    replicas: int | Literal["per_core"] = Field(1, description="How many; `per_core`: one per CPU core, at most 2.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor_parallel: int = Field(1, ge=1, le=64)
    pipeline_parallel: int = Field(1, ge=1, le=64)
    cpus: float = Field(1.0, ge=0, le=1024, description="Cores of one replica; bound to it when whole and on CPU.")
    engine: dict[str, Any] = Field(default_factory=dict, description="vLLM engine arguments, by their Python names.")


class SimulatedEngine(Tree):
    """Timing and size of a simulated engine. An iteration takes
    `step_s + prefill_token_s * prefill_tokens + decode_sequence_s * decode_sequences
    + context_token_s * context_tokens` seconds.
    """

    block_size: int = Field(16, ge=1, le=4096)
    num_blocks: int = Field(4096, ge=1)
    max_batched_tokens: int = Field(2048, ge=1)
    max_running: int = Field(256, ge=1)
    max_model_len: int = Field(32768, ge=1)
    step_s: float = Field(0.005, ge=0, le=60)
    prefill_token_s: float = Field(0.0000625, ge=0, le=1)
    decode_sequence_s: float = Field(0.0002, ge=0, le=1)
    context_token_s: float = Field(0.0, ge=0, le=1)


class Model(Tree):
    """One served model."""

    name: str = Field(min_length=1, max_length=256, description="What clients send as `model`.")
    backend: Literal["vllm", "simulated", "external"] = "vllm"
    source: str = Field("embedded", description="`embedded`, a folder, or a Hugging Face id. vLLM only.")
    pools: tuple[Pool, ...] = (Pool(),)
    simulated: SimulatedEngine = SimulatedEngine()
    urls: tuple[str, ...] = Field((), description="Servers that already run. External only.")
    api_key: str | None = Field(None, description="Sent to external servers instead of the client's own key.")


class Fleet(Tree):
    """The replicas as a whole."""

    name: str = Field("headrace", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    start_timeout_s: float = Field(600.0, gt=0, le=86400)
    drain_timeout_s: float = Field(30.0, ge=0, le=86400)
    report_interval_s: float = Field(0.1, ge=0.01, le=10, description="Longest silence between load reports.")
    dead_after_s: float = Field(0.8, gt=0, le=60, description="Silence after which a replica leaves the view.")
    max_restart_backoff_s: float = Field(60.0, gt=0, le=3600)


class Limits(Tree):
    """Bounds on what a client may send."""

    head_bytes: int = Field(64 * 1024, ge=1024, le=1024 * 1024)
    body_bytes: int = Field(64 * 1024 * 1024, ge=1024, le=4 * 1024**3)
    json_depth: int = Field(128, ge=8, le=1000)


class Timeouts(Tree):
    """Seconds."""

    head_s: float = Field(10.0, gt=0, le=3600, description="From a request's first byte to the end of its head.")
    body_s: float = Field(60.0, gt=0, le=3600, description="Longest pause while the body arrives.")
    connect_s: float = Field(2.0, gt=0, le=60)
    first_byte_s: float = Field(600.0, gt=0, le=86400, description="From sending upstream to the first byte back.")
    idle_s: float = Field(300.0, gt=0, le=86400, description="Longest upstream silence within an answer.")
    client_stall_s: float = Field(600.0, gt=0, le=86400, description="Longest time a client may not read.")
    keep_alive_s: float = Field(75.0, gt=0, le=3600)


class Gateway(Tree):
    """The HTTP front."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port.")
    policy: Literal["round_robin", "random", "least_loaded", "power_of_two"] = "least_loaded"
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    retries: int = Field(2, ge=0, le=10, description="Other replicas tried before the first byte of an answer.")
    access_log: bool = True
    seed: int = Field(0, description="Of the policies that draw lots.")


class Config(Tree):
    """The whole configuration."""

    fleet: Fleet = Fleet()
    models: tuple[Model, ...] = Field(min_length=1)
    gateway: Gateway = Gateway()
