"""What a live address is: which FFmpeg input reads it, and what may be expected of it.

rtsp://HOST/...  rtsps://HOST/...         a camera or an NVR
http://HOST/...  https://HOST/...         MJPEG, HLS, a progressive stream, or a whole file
camera:0  camera:NAME  /dev/video0        a webcam
lavfi:testsrc2=size=640x360:rate=15       FFmpeg's filters as a test camera
-                                         standard input
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from stream.errors import SourceError

from .base import without_credentials
from .live_values import LiveSettings, Policy

Kind = Literal["rtsp", "http", "camera", "lavfi", "stdin"]

_FORMS = (
    "rtsp://, rtsps://, http:// and https:// addresses, camera:0, lavfi:testsrc2 and - "
    "(standard input) are known"
)
_WHOLE_FILES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
_DEFAULT_PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}
_PROBE_US = 200_000
_HTTP_PROTOCOLS = "http,https,httpproxy,tcp,tls,crypto,data"


@dataclass(frozen=True, slots=True)
class Address:
    """An address and how FFmpeg is to open it.

    url: what FFmpeg opens, secrets included; never print it. shown: what may be printed.
    format: FFmpeg's name of the input, None where it finds out. host, port: of the server, if any.
    policy: the drop policy that suits it. comes_back: whether a lost connection is tried again.
    """

    kind: Kind
    url: str
    shown: str
    format: str | None = None
    host: str = ""
    port: int = 0
    policy: Policy = "latest"
    comes_back: bool = True

    def __repr__(self) -> str:
        return f"Address({self.shown})"

    def options(self, settings: LiveSettings, relay_port: int | None) -> dict[str, str]:
        """FFmpeg's options. relay_port: of the loopback relay that HTTP is to pass, if any."""
        match self.kind:
            case "rtsp":
                return {
                    "rtsp_transport": settings.rtsp_transport,
                    "allowed_media_types": "video",
                    "analyzeduration": str(_PROBE_US),
                }
            case "http":
                through = {"http_proxy": f"http://127.0.0.1:{relay_port}"} if relay_port else {}
                return {
                    "protocol_whitelist": _HTTP_PROTOCOLS,
                    "http_persistent": "0",
                    **through,
                }
            case _:
                return {}

    def through(self, relay_port: int) -> str:
        """The url with its server replaced by a relay on loopback."""
        before, _, rest = self.url.partition("://")
        authority, slash, path = rest.partition("/")
        user, at, _ = authority.rpartition("@")
        return f"{before}://{user}{at}127.0.0.1:{relay_port}{slash}{path}"

    def without_secrets(self, text: str) -> str:
        """`text` fit for a log: this address in it is shown as `shown`, others are stripped."""
        return without_credentials(text.replace(self.url, self.shown))


def parse_address(text: str) -> Address:
    """Raises SourceError if it is no address that can be opened; the text says what can."""
    if text == "-":
        return Address("stdin", "-", "standard input", policy="block", comes_back=False)
    if text.startswith("/dev/"):
        return _camera(text)
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    if scheme == "camera":
        return _camera(rest)
    shown = without_credentials("%20".join(text.split()))
    if scheme == "lavfi":
        if not rest:
            raise SourceError("lavfi: needs a description, such as lavfi:testsrc2=rate=15.")
        return Address("lavfi", rest, shown, format="lavfi", comes_back=False)
    if scheme not in _DEFAULT_PORTS:
        raise SourceError(f"{shown} is an address of a kind that cannot be opened; {_FORMS}.")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not text.isprintable() or " " in text:
        raise SourceError(
            f"{shown} is not a well-formed address: {scheme}://[USER:PASSWORD@]HOST[:PORT]/PATH. "
            "Write spaces, '@', ':', '/', '?', '#' and '%' in a user or password as %20, %40, "
            "%3A, %2F, %3F, %23 and %25."
        )
    whole = scheme.startswith("http") and parts.path.lower().endswith(_WHOLE_FILES)
    return Address(
        "http" if scheme.startswith("http") else "rtsp",
        scheme + text[len(scheme) :],
        shown,
        host=host,
        port=port or _DEFAULT_PORTS[scheme],
        policy="block" if whole else "latest",
        comes_back=not whole,
    )


def _camera(name: str) -> Address:
    if not name:
        raise SourceError("camera: needs an index or a name, such as camera:0.")
    shown = f"camera {without_credentials(name)}"
    if sys.platform == "darwin":
        return Address("camera", f"{name}:none", shown, format="avfoundation")
    if sys.platform == "win32":
        if name.isdecimal():
            raise SourceError(
                f"{shown}: DirectShow knows cameras by name, not by index; give camera:NAME, "
                "as in the device manager."
            )
        return Address("camera", f"video={name}", shown, format="dshow")
    path = f"/dev/video{name}" if name.isdecimal() else name
    return Address("camera", path, shown, format="video4linux2")
