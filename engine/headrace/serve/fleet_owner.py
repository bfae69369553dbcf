"""Whose fleet it is: the deployment of a Serve application, and whether Serve still has it."""

from __future__ import annotations

from dataclasses import dataclass

from ray import serve


@dataclass(frozen=True, slots=True)
class FleetOwner:
    """The ingress deployment that a fleet lives and ends with."""

    app: str
    deployment: str

    def is_deployed(self) -> bool:
        """Whether Serve knows the deployment, running or on its way there or away. Blocks; raises what Ray raises while
        Serve's controller is away for a moment. Without Serve nothing is deployed."""
        app = serve.status().applications.get(self.app)
        return app is not None and self.deployment in app.deployments

    def __str__(self) -> str:
        return f"Serve application {self.app!r}"
