"""What stands before Ray Serve's own routes, in its proxies; Serve calls `middlewares`, which a variable names."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

_OWN = "/-/"  # Serve answers below it itself, in front of every application
_HEALTH = "/-/healthz"


class NoOwnRoutes:
    """Hands what Serve would tell anybody who asks, but for its health, to the application, where keys are asked for.

    Serve knows its own routes by their exact paths; with a slash more they are like any other to it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_OWN) and scope["path"] != _HEALTH:
            scope = {**scope, "path": f"{scope['path']}/"}
        await self.app(scope, receive, send)


def middlewares() -> list[Middleware]:
    return [Middleware(NoOwnRoutes)]
