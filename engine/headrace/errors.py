"""Everything that can go wrong, in three families.

    HeadraceError
    ├── CallerError            the caller erred; an HTTP caller gets 4xx; never retried
    │   ├── ConfigError            the configuration says something that cannot be
    │   ├── BadRequest             400
    │   ├── Unauthorized           401
    │   ├── NotFound               404: unknown path, unknown model
    │   ├── MethodNotAllowed       405
    │   ├── BodyTooLarge           413
    │   └── HeadTooLarge           431
    ├── ShortageError          the system is short of something; retryable; 503 unless it says otherwise
    │   ├── NoReplica              no replica of the model is ready
    │   ├── QueueFull              429: all replicas are busy, and more waits than may
    │   ├── Overloaded             all replicas are busy, and its turn would come too late
    │   ├── QueueTimeout           504: it waited for a replica until its deadline
    │   ├── UpstreamFailed         502: a replica died and no other could take over
    │   ├── UpstreamTimeout        504
    │   ├── ReplicaUnhealthy       a health check failed
    │   ├── SleepFailed            a replica could not be put to sleep, or is not what it was after waking
    │   └── StartError             a replica, a fleet or a gateway could not start
    │       └── FatalStartError        ...and will not, however often it is tried
    └── Bug                    ours; 500; the message asks for a report

Messages hold the value, the bound and the next step, in one line.
"""

from __future__ import annotations


class HeadraceError(Exception):
    """Root of the tree. `status`, `type` and `code` fill OpenAI's error body."""

    status = 500
    type = "internal_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class CallerError(HeadraceError):
    """The caller erred: repeating the same call cannot succeed."""

    status = 400
    type = "invalid_request_error"


class ConfigError(CallerError):
    """A configuration that cannot be. The message names the key, the value and the bound."""


class BadRequest(CallerError):
    """Malformed HTTP, malformed JSON, a field of the wrong type."""


class Unauthorized(CallerError):
    """The key is missing or unknown."""

    status = 401
    code = "invalid_api_key"


class NotFound(CallerError):
    """No such path or model."""

    status = 404


class ModelNotFound(NotFound):
    """The model is not served here."""

    code = "model_not_found"


class MethodNotAllowed(CallerError):
    """The path exists, the method does not."""

    status = 405


class RequestTimeout(CallerError):
    """The client did not send its request in time."""

    status = 408


class BodyTooLarge(CallerError):
    """The body is over the configured limit."""

    status = 413


class HeadTooLarge(CallerError):
    """The request line and headers are over the configured limit."""

    status = 431


class ShortageError(HeadraceError):
    """The system is short of something; the same call may succeed after `retry_after_s`."""

    status = 503
    type = "service_unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class NoReplica(ShortageError):
    """No replica of the model is ready."""

    code = "no_replica"


class QueueFull(ShortageError):
    """All replicas are busy and the caller's tenant holds the largest part of a full queue."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class Overloaded(ShortageError):
    """All replicas are busy and the request's turn would come after its deadline."""

    code = "overloaded"


class QueueTimeout(ShortageError):
    """The request waited for a replica with room until its deadline."""

    status = 504
    code = "queue_timeout"


class ShuttingDown(ShortageError):
    """The gateway is draining."""

    code = "shutting_down"


class UpstreamFailed(ShortageError):
    """A replica failed and no other could take the request."""

    status = 502
    type = "upstream_error"
    code = "upstream_failed"


class UpstreamTimeout(ShortageError):
    """A replica did not answer in time."""

    status = 504
    type = "upstream_error"
    code = "upstream_timeout"


class ReplicaUnhealthy(ShortageError):
    """A replica's health check failed."""


class SleepFailed(ShortageError):
    """A replica could not be put to sleep, or is not what it was after waking."""


class StartError(ShortageError):
    """Something could not start. Worth another try."""


class FatalStartError(StartError):
    """Something could not start and the same start will fail again: a missing model, a taken port."""


class Bug(HeadraceError):
    """Our mistake."""
