"""What every web server of this code base needs: a socket, bounded requests, and a stop that loses no request."""

import asyncio
import contextlib
import socket
from collections.abc import Mapping

import uvicorn
from starlette.applications import Starlette

from richhf_data.errors import UserError

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises UserError if the address is in use, or is none of this machine."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        raise UserError(f"port: cannot listen on {host}:{port} ({error.strerror}); take another --port or --host") from error
    return bound


def address(bound: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def with_headers(send, headers: Mapping[str, str]):
    """ASGI's `send`, which adds these headers to a response that does not have them."""

    async def sending(message):
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message["headers"]}
            more = [(name.encode(), value.encode()) for name, value in headers.items() if name.encode() not in given]
            message = message | {"headers": [*message["headers"], *more]}
        await send(message)

    return sending


def run(application: Starlette, bound: socket.socket, proxy: bool = False, grace: int = 5, **options) -> None:
    """Serves until SIGINT or SIGTERM; requests that have begun are finished.

    Args:
      proxy: a server of this machine passes the requests on, and says in X-Forwarded-For whose they are.
      grace: seconds in which requests may finish. options: of uvicorn.Config.
    """
    options = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": grace} | options
    config = uvicorn.Config(application, proxy_headers=proxy, forwarded_allow_ips="127.0.0.1", **options)
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        uvicorn.Server(config).run(sockets=[bound])
