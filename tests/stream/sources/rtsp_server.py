"""A real RTSP server. Run by the system's Python, which has GStreamer's bindings:

    python3 rtsp_server.py PORT WIDTHxHEIGHT FPS

It serves a moving picture at /moving and one that stays the same at /still to the user me with the
password hunter2 (digest), says `ready PORT` when it listens (port 0 takes a free one), and runs
until killed.
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

NEEDED = ("videotestsrc", "x264enc", "rtph264pay", "rtpbin")


def main(port: str, size: str, fps: str) -> None:
    Gst.init(None)
    missing = [name for name in NEEDED if Gst.ElementFactory.find(name) is None]
    if missing:
        sys.exit(f"GStreamer lacks {', '.join(missing)}")
    width, height = size.split("x")
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "viewer")
    login = GstRtspServer.RTSPAuth()
    login.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
    login.add_digest("me", "hunter2", token)
    server.set_auth(login)
    allowed = GstRtspServer.RTSPPermissions()
    allowed.add_role("viewer")
    for permission in ("media.factory.access", "media.factory.construct"):
        allowed.add_permission_for_role("viewer", permission, True)
    for path, pattern in (("/moving", "ball"), ("/still", "blue")):
        factory = GstRtspServer.RTSPMediaFactory()
        factory.set_shared(True)
        factory.set_permissions(allowed)
        factory.set_launch(
            f"( videotestsrc is-live=true pattern={pattern}"
            f" ! video/x-raw,width={width},height={height},framerate={fps}/1"
            " ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15"
            " ! rtph264pay name=pay0 pt=96 )"
        )
        server.get_mount_points().add_factory(path, factory)
    if not server.attach(None):
        sys.exit(f"port {port} cannot be had")
    sys.stdout.write(f"ready {server.get_bound_port()}\n")
    sys.stdout.flush()
    GLib.MainLoop().run()


if __name__ == "__main__":
    main(*sys.argv[1:])
