"""Whose fleet it is: the deployment of a Serve application, and whether Serve still has it."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE


@dataclass(frozen=True, slots=True)
class FleetOwner:
    """The ingress deployment that a fleet lives and ends with."""

    app: str
    deployment: str

    def is_deployed(self) -> bool:
        """Whether Serve knows the deployment, running or on its way there or away. Blocks; raises what Ray raises while
        Serve's controller is away for a moment. Without Serve nothing is deployed."""
        try:
            # A client that knew Serve before it was shut down goes on asking a controller that is no more.
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            return False
        app = serve.status().applications.get(self.app)
        return app is not None and self.deployment in app.deployments

    def __str__(self) -> str:
        return f"Serve application {self.app!r}"
