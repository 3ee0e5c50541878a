"""`foveate serve`: the model loaded, cameras attached, an HTTP server until Ctrl-C."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stream.errors import ConfigError, SourceError

from .. import __version__
from ..serve.service import Access, ServeConfig, Service
from ..settings import AskConfig, reducer_of
from ..show import err
from .watch import names_of

if TYPE_CHECKING:
    import uvicorn

_GRACE_S = 5
_HEAD_S = 15


def access_of(
    host: str,
    api_key_env: str | None,
    without_key: bool,
    roots: Sequence[Path],
    remote: bool,
    private: bool,
) -> Access:
    """Raises ConfigError where the server would be open to others without anybody saying so."""
    key = None
    if api_key_env is not None:
        key = os.environ.get(api_key_env, "").strip()
        if not key:
            raise ConfigError(
                f"--api-key-env {api_key_env}: that variable is not set or empty; export it first."
            )
    loopback = _is_loopback(host)
    if not (loopback or key or without_key):
        raise ConfigError(
            f"--host {host} lets other machines in. Give an API key (--api-key-env NAME), or say "
            "--without-key."
        )
    for root in roots:
        if not root.is_dir():
            raise ConfigError(f"--allow-root {root}: there is no such folder.")
    return Access(key, loopback, tuple(roots), remote, private)


def serve(
    config: ServeConfig, access: Access, host: str, port: int, streams: Sequence[str]
) -> None:
    """Until Ctrl-C; answers under way get a few seconds to end."""
    listener = _listen(host, port)
    service = make_service(config, access)
    names = names_of(list(streams))
    for name, source in names.items():
        service.attach(name, source, {}, trusted=True).result()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    place = listener.getsockname()
    shown = f"[{place[0]}]" if listener.family == socket.AF_INET6 else place[0]
    err.print(f"{service.model} at http://{shown}:{place[1]}/v1", highlight=False)
    if names:
        err.print(f"attached: {', '.join(names)}", highlight=False)
    server_of(service).run(sockets=[listener])


def server_of(service: Service, head_s: int = _HEAD_S, grace_s: int = _GRACE_S) -> uvicorn.Server:
    """head_s: how long a request's head may take. grace_s: what requests get to end at the end."""
    import uvicorn

    from ..serve.app import make_app
    from ..serve.edge import Connection

    return uvicorn.Server(
        uvicorn.Config(
            make_app(service),
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=head_s,
            timeout_graceful_shutdown=grace_s,
        )
    )


def make_service(config: ServeConfig, access: Access) -> Service:
    """With its model loaded."""
    from .ask import load_reasoner

    reducer = reducer_of(config.reducer, **config.settings)
    asking = AskConfig(
        model=config.model,
        positions=config.positions,
        capture=config.capture,
        device=config.device,
    )
    return Service(config, access, load_reasoner(asking, reducer), reducer, __version__)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """Taken before the model is loaded, so that a port in use is known at once."""
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family)
    except OSError as error:
        raise SourceError(
            f"{host}:{port} cannot be listened at ({error.strerror or error}); give another --port."
        ) from None
