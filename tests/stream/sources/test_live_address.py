"""Addresses: what they open, and that their secrets are shown nowhere."""

from __future__ import annotations

import string
import sys
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stream.config import parse
from stream.errors import ConfigError, SourceError
from stream.sources.base import is_live, without_credentials
from stream.sources.live_address import Kind, parse_address
from stream.sources.live_values import LiveSettings, Policy


@pytest.mark.parametrize(
    ("text", "kind", "policy", "comes_back"),
    [
        ("rtsp://cam/main", "rtsp", "latest", True),
        ("RTSPS://cam:8322/main", "rtsp", "latest", True),
        ("http://cam/video.mjpg", "http", "latest", True),
        ("https://cdn.example/live.m3u8?t=1", "http", "latest", True),
        ("https://cdn.example/clip.MP4?t=1", "http", "block", False),
        ("lavfi:testsrc2=rate=15", "lavfi", "latest", False),
        ("-", "stdin", "block", False),
    ],
)
def test_kinds(text: str, kind: Kind, policy: Policy, comes_back: bool) -> None:
    address = parse_address(text)
    assert is_live(text)
    assert (address.kind, address.policy, address.comes_back) == (kind, policy, comes_back)


@pytest.mark.parametrize(
    ("platform", "text", "url", "form"),
    [
        ("linux", "camera:0", "/dev/video0", "video4linux2"),
        ("linux", "/dev/video3", "/dev/video3", "video4linux2"),
        ("linux", "camera:/dev/v4l/by-id/cam", "/dev/v4l/by-id/cam", "video4linux2"),
        ("darwin", "camera:1", "1:none", "avfoundation"),
        ("win32", "camera:HD Webcam", "video=HD Webcam", "dshow"),
    ],
)
def test_webcams(
    monkeypatch: pytest.MonkeyPatch, platform: str, text: str, url: str, form: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    address = parse_address(text)
    assert (address.kind, address.url, address.format) == ("camera", url, form)


def test_directshow_knows_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SourceError, match="by name, not by index"):
        parse_address("camera:0")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://host/x", "of a kind that cannot be opened; rtsp://"),
        ("rtsp://", "not a well-formed address"),
        ("rtsp://host:port/x", "not a well-formed address"),
        ("http://ho st/x", "not a well-formed address"),
        ("lavfi:", "needs a description"),
        ("camera:", "needs an index or a name"),
    ],
)
def test_addresses_that_open_nothing(text: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        parse_address(text)


@pytest.mark.parametrize("text", ["video.mp4", "/a/b", "rtsp", "-x", "/dev/video", "camera", "."])
def test_paths_are_no_addresses(text: str) -> None:
    assert not is_live(text)


def test_a_relay_takes_the_place_of_the_server_only() -> None:
    address = parse_address("rtsp://me:pw@cam:8554/main/1?x=y")
    assert (address.host, address.port) == ("cam", 8554)
    assert address.through(9) == "rtsp://me:pw@127.0.0.1:9/main/1?x=y"
    assert parse_address("rtsp://[::1]/main").through(9) == "rtsp://127.0.0.1:9/main"
    assert parse_address("rtsp://[::1]/main").host == "::1"


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("rtsp://user@host/x", "rtsp://host/x"),
        ("rtsp://u:a/b@host/x", "rtsp://***"),
        ("rtsp://u:a?b@host/x", "rtsp://***"),
        ("rtsp://u:p@host/h@ndle", "rtsp://***"),
        ("'rtsp://u:p@host/x'", "'rtsp://host/x'"),
        ("RTSP://U:P@host", "RTSP://host"),
        (
            "rtsp://h:554/user=admin&password=pw&channel=1.sdp",
            "rtsp://h:554/user=***&password=***&channel=1.sdp",
        ),
        ("rtsp://h/user=admin_password=pw_channel=1", "rtsp://h/user=***"),
        ("http://h/v/apikey=abc/x", "http://h/v/apikey=***/x"),
        (r"lavfi:movie=rtsp\://u:p@h/x", r"lavfi:movie=rtsp\://h/x"),
    ],
)
def test_forms_of_credentials(given_text: str, shown: str) -> None:
    assert without_credentials(given_text) == shown


def all_that_is_shown(address: str) -> str:
    try:
        parsed = parse_address(address)
    except SourceError as error:
        return str(error)
    return parsed.shown + repr(parsed)


SECRETS = st.text(string.digits + string.ascii_letters + string.punctuation, min_size=1).map(
    lambda text: f"S3CR3T{text}S3CR3T"
)


@given(
    scheme=st.sampled_from(["rtsp", "rtsps", "http", "https", "srt", "HTTP"]),
    user=st.one_of(st.just("admin"), SECRETS),
    password=st.one_of(st.none(), SECRETS),
    path=st.sampled_from(["", "/", "/a/b.m3u8", "/p@th", "/cam;x"]),
    query=st.one_of(st.none(), SECRETS),
    around=st.sampled_from(["{}", "cannot open '{}'", "a {} b", "[{}]: refused", "\t{}\n"]),
)
@example("rtsp", "S3CR3T", "S3CR3T/S3CR3T@S3CR3T", "", "S3CR3T@S3CR3T", "{}")
@example("rtsp", "admin", None, "/p@th", "S3CR3T", "{}")
def test_no_secret_is_shown(
    scheme: str, user: str, password: str | None, path: str, query: str | None, around: str
) -> None:
    login = user if password is None else f"{user}:{password}"
    address = f"{scheme}://{login}@camera.local{path}" + ("" if query is None else f"?{query}")
    assert "S3CR3T" not in without_credentials(around.format(address))
    assert "S3CR3T" not in all_that_is_shown(address)
    with suppress(SourceError):
        shown = parse_address(address).without_secrets(around.format(address))
        assert "S3CR3T" not in shown


@given(secret=st.text(min_size=1).map(lambda text: f"S3CR3T{text}S3CR3T"))
def test_no_secret_of_any_characters_is_shown_in_a_refusal(secret: str) -> None:
    assert "S3CR3T" not in all_that_is_shown(f"rtsp://me:{secret}@camera.local/x")


def test_settings_are_checked() -> None:
    assert parse("policy: drop-oldest\nqueue_frames: 3", LiveSettings).queue_frames == 3
    with pytest.raises(ConfigError, match=r"retry_cap_s is .* below retry_first_s"):
        parse("retry_cap_s: 0.1", LiveSettings)
    with pytest.raises(ConfigError, match="policy"):
        parse("policy: newest", LiveSettings)
