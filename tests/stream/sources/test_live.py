"""Live sources against servers on loopback, FFmpeg's test pictures and standard input."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from stream.errors import SourceError
from stream.sources import Fps, Uniform, open_source
from stream.sources.live import CLOSE_S, Live
from stream.sources.live_soak import soak
from stream.sources.live_values import End, LiveFrame, LiveSettings, Policy, Silence
from tests.stream.sources.live_servers import (
    QUICK,
    MjpegCamera,
    files_of,
    live_hls,
    mute_server,
    next_frame,
    run_with_stdin,
    wait_until,
    web_server,
    write_hls,
)
from tests.stream.sources.making import corrupt_packets, cut

LAVFI = "lavfi:testsrc2=size=160x96:rate=30"


def live_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("live")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    assert live_threads() == []
    yield
    assert live_threads() == []


@pytest.fixture
def camera() -> MjpegCamera:
    return MjpegCamera()


@pytest.fixture
def camera_url(camera: MjpegCamera) -> Iterator[str]:
    with web_server(camera.handler()) as port:
        yield f"http://127.0.0.1:{port}/video"
        camera.hang_up = True


def test_a_test_camera_keeps_real_time() -> None:
    with Live(LAVFI, QUICK) as source:
        assert (source.info.width, source.info.height) == (160, 96)
        next_frame(source)
        began_s = time.monotonic()
        frames = [next_frame(source) for _ in range(30)]
        assert 0.8 < time.monotonic() - began_s < 1.5
    assert all(one.frame.pts_s < other.frame.pts_s for one, other in pairwise(frames))
    assert all(frame.age_s(time.monotonic()) < 2 for frame in frames)
    assert abs(frames[0].arrival_unix_s - time.time()) < 3
    assert all(frame.gap is None for frame in frames)


@pytest.mark.parametrize(
    ("policy", "frames", "oldest_s"), [("latest", 8, 0.1), ("drop-oldest", 4, 0.25)]
)
def test_a_slow_consumer_gets_recent_frames(policy: Policy, frames: int, oldest_s: float) -> None:
    settings = LiveSettings(policy=policy, queue_frames=frames)
    report = soak(LAVFI, 2.5, settings, pause_s=0.2)
    assert 25 < report["fps_in"] < 35
    assert 3 < report["fps_out"] < 6
    assert report["age_p50_s"] < oldest_s
    in_hand = report["frames_decoded"] - report["frames_delivered"] - report["frames_dropped"]
    assert 0 <= in_hand <= frames
    assert report["reconnects"] == report["gaps"] == report["silences"] == 0


def test_dropped_frames_are_counted_on_the_next_one() -> None:
    with Live(LAVFI, QUICK) as source:
        before = next_frame(source)
        for _ in range(4):
            time.sleep(0.2)
            got = next_frame(source)
            assert got.dropped == got.frame.index - before.frame.index - 1 > 2
            before = got


def test_block_drops_nothing_and_waits() -> None:
    settings = LiveSettings(policy="block", queue_frames=3, silent_s=0.3)
    with Live(LAVFI, settings) as source:
        for index in range(10):
            time.sleep(0.05)
            assert next_frame(source).frame.index == index
        time.sleep(0.5)
        assert source.stats.frames_decoded <= 10 + 3 + 1
        assert source.stats.phase == "live"
        quick = [next_frame(source).frame for _ in range(300)]
    assert [frame.index for frame in quick] == list(range(10, 310))
    assert quick[-1].pts_s == pytest.approx(309 / 30)


def test_a_description_that_means_nothing() -> None:
    with Live("lavfi:nosuchfilter", QUICK) as source:
        got = source.take(5)
        assert isinstance(got, End)
        assert got.failed
        with pytest.raises(SourceError, match="gives no picture"):
            assert source.info


def test_a_webcam_that_is_not_plugged_in() -> None:
    with Live("camera:99", QUICK) as source:
        assert isinstance(source.take(0.3), Silence)
        assert "No such" in source.stats.last_error
        assert source.stats.phase == "lost"


def test_a_playlist_may_not_reach_for_files(tmp_path: Path) -> None:
    write_hls(tmp_path, seconds=1)
    segment = next(tmp_path.glob("*.ts"))
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nfile://{segment}\n#EXT-X-ENDLIST\n"
    (tmp_path / "all.m3u8").write_text(text)
    with (
        web_server(files_of(tmp_path)) as port,
        Live(f"http://127.0.0.1:{port}/all.m3u8", QUICK) as source,
    ):
        assert isinstance(source.take(0.5), Silence)
        assert source.stats.packets == 0


def test_motion_jpeg(camera: MjpegCamera, camera_url: str) -> None:
    with Live(camera_url, QUICK) as source:
        frames = [next_frame(source) for _ in range(20)]
        assert source.info.codec == "mjpeg"
    assert frames[0].frame.image.shape == (96, 160, 3)
    media_s = np.diff([frame.frame.pts_s for frame in frames])
    assert media_s == pytest.approx(np.diff([frame.arrival_s for frame in frames]), abs=0.002)


def test_frozen_and_silent_are_told_apart(camera: MjpegCamera, camera_url: str) -> None:
    with Live(camera_url, QUICK) as source:
        next_frame(source)
        camera.still = True
        wait_until(lambda: source.stats.phase == "frozen")
        assert isinstance(source.take(1), LiveFrame)
        camera.still = False
        wait_until(lambda: source.stats.phase == "live")

        camera.silent = True
        while isinstance(got := source.take(1.0), LiveFrame):
            pass
        assert isinstance(got, Silence)
        assert got.phase in ("silent", "lost", "connecting")
        assert got.frame_age_s is not None
        assert got.frame_age_s >= 0.8
        assert source.stats.frame_age_s is not None
        camera.silent = False
        after = next_frame(source)
        assert after.gap is not None
        assert after.gap.causes == ("reconnect",)
        assert after.gap.missing_s > 0.8
        assert after.age_s(time.monotonic()) < 0.3
        phases = [change.phase for change in source.stats.changes]
    assert "silent" in phases[phases.index("frozen") :]
    assert "no packet for" in source.stats.last_error
    json.dumps(source.stats.as_dict())


def test_a_camera_that_comes_later_and_goes_away(camera: MjpegCamera) -> None:
    with mute_server() as port:
        pass
    with Live(f"http://me:hunter2@127.0.0.1:{port}/?token=hunter3", QUICK) as source:
        got = source.take(1.0)
        assert isinstance(got, Silence)
        assert got.frame_age_s is None
        wait_until(lambda: "no connection to 127.0.0.1" in source.stats.last_error)
        with web_server(camera.handler(), port):
            next_frame(source)
            camera.hang_up = True
            wait_until(lambda: source.stats.phase == "lost")
        camera.hang_up = False
        camera.size = (320, 192)
        with web_server(camera.handler(), port):
            wait_until(lambda: source.stats.reconnects == 1)
            after = next_frame(source)
            while after.gap is None:
                after = next_frame(source)
            assert after.gap.causes == ("reconnect", "change")
            assert after.frame.image.shape == (192, 320, 3)
            assert all(visit == "/?token=hunter3" for visit in camera.visits)
            camera.hang_up = True
        said = f"{source!r} {source.stats} {source.report} {source.info} {got}"
    assert "hunter" not in said


def test_a_change_of_size_is_a_gap(camera: MjpegCamera, camera_url: str) -> None:
    with Live(camera_url, QUICK) as source:
        next_frame(source)
        camera.size = (96, 160)
        frame = wait_until(lambda: (got := next_frame(source)).gap and got)
        assert frame.gap.causes == ("change",)
        assert frame.frame.image.shape == (160, 96, 3)


def test_passwords_are_used_and_not_shown(
    camera: MjpegCamera, camera_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    camera.password = base64.b64encode(b"me:hunter2").decode()
    with Live(camera_url.replace("//", "//me:hunter2@"), QUICK) as source:
        next_frame(source)
    brief = QUICK.model_copy(update={"open_timeout_s": 1.0})
    with Live(camera_url.replace("//", "//me:hunter3@"), brief) as source:
        wait_until(lambda: "401" in source.stats.last_error)
        with pytest.raises(SourceError, match="401") as caught:
            assert source.info
        said = f"{caught.value} {source!r} {source.stats} {source.take(0)} {source.report}"
    printed = capfd.readouterr()
    assert "hunter" not in said + printed.out + printed.err


def test_hls_that_is_live_is_shown_at_its_own_pace(tmp_path: Path) -> None:
    write_hls(tmp_path)
    with (
        web_server(live_hls(tmp_path)) as port,
        Live(f"http://127.0.0.1:{port}/live.m3u8", QUICK) as source,
    ):
        next_frame(source)
        began_s = time.monotonic()
        frames = [next_frame(source) for _ in range(25)]
        assert time.monotonic() - began_s > 1.8
        assert source.policy == "latest"
    assert sum(frame.dropped for frame in frames) < len(frames)


def test_hls_with_an_end(tmp_path: Path) -> None:
    write_hls(tmp_path, seconds=3)
    with web_server(files_of(tmp_path)) as port:
        address = f"http://127.0.0.1:{port}/all.m3u8"
        with Live(address, LiveSettings(policy="block")) as source:
            frames = list(source)
            assert source.take(0) == End("it came to its end")
    assert [got.frame.index for got in frames if isinstance(got, LiveFrame)] == list(range(30))


def test_a_whole_file_over_http_is_read_like_a_file(front_index_mp4: Path) -> None:
    with open_source(front_index_mp4) as source:
        expected = list(source.read(Fps(8)))
    with web_server(files_of(front_index_mp4.parent)) as port:
        address = f"http://127.0.0.1:{port}/{front_index_mp4.name}"
        with open_source(address) as source:
            frames = list(source.read(Fps(8)))
            assert source.report.complete
            with pytest.raises(SourceError, match="is read once"):
                source.read(Fps(8))
        with open_source(address) as source:
            assert len(list(source.read(Uniform(5)))) == 5
    assert [frame.pts_s for frame in frames] == pytest.approx([frame.pts_s for frame in expected])
    for frame, other in zip(frames, expected, strict=True):
        assert np.array_equal(frame.image, other.image)


def test_damage_costs_what_it_costs_in_a_file(clean_mkv: Path, tmp_path: Path) -> None:
    damaged = corrupt_packets(clean_mkv, tmp_path / "damaged.mkv", [9, 20, 21])
    with open_source(damaged) as source:
        expected = [frame.pts_s for frame in source.read(Fps(1000))]
        assert not source.report.complete
        harm = source.report.packets_failed, source.report.frames_patched
    with (
        web_server(files_of(tmp_path)) as port,
        open_source(f"http://127.0.0.1:{port}/damaged.mkv") as source,
    ):
        times_s = [frame.pts_s for frame in source.read(Fps(1000))]
        assert (source.report.packets_failed, source.report.frames_patched) == harm
    assert times_s == pytest.approx(expected)


def test_a_file_over_http_that_breaks_off(front_index_mp4: Path, tmp_path: Path) -> None:
    short = cut(front_index_mp4, tmp_path / "cut.mp4", 0.8)
    with open_source(short) as source:
        expected = len(list(source.read(Fps(1000))))
    with (
        web_server(files_of(tmp_path)) as port,
        open_source(f"http://127.0.0.1:{port}/cut.mp4") as source,
    ):
        assert len(list(source.read(Fps(1000)))) == expected
        assert source.report.truncated is not None
        assert source.report.truncated.startswith("cut short")
        assert not source.report.complete


def test_as_a_source_it_gives_frames_at_a_rate() -> None:
    with open_source(LAVFI) as source:
        times_s = [frame.pts_s for frame in islice(source.read(Fps(10)), 6)]
    assert times_s[-1] - times_s[0] == pytest.approx(0.5, abs=0.2)


def test_an_endless_source_has_no_even_spread(camera_url: str) -> None:
    with open_source(camera_url) as source, pytest.raises(SourceError, match="goes on without end"):
        next(source.read(Uniform(8)))
    with open_source(camera_url) as source, pytest.raises(SourceError, match="is read once"):
        source.read(Fps(1), start=3)
    with pytest.raises(SourceError, match="is live, which decord cannot read"):
        open_source(camera_url, decoder="decord")


def test_standard_input(clean_mkv: Path) -> None:
    process = run_with_stdin(
        "from stream.sources.live import Live\n"
        "from stream.sources.live_values import LiveFrame, LiveSettings\n"
        "with Live('-', LiveSettings(silent_s=0.5)) as source:\n"
        "    for got in source:\n"
        "        print(got.frame.index if isinstance(got, LiveFrame) else got.phase, flush=True)\n"
        "    print(source.take(0).said)\n"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    data = clean_mkv.read_bytes()
    process.stdin.write(data[:-2000])
    process.stdin.flush()
    lines = [process.stdout.readline().decode().strip()]
    while lines[-1] != "silent":
        lines.append(process.stdout.readline().decode().strip())
    rest, _ = process.communicate(data[-2000:], timeout=30)
    lines += rest.decode().split("\n")
    assert [int(line) for line in lines if line.isdecimal()] == list(range(48))
    assert "it came to its end" in lines


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_closing_while_a_server_keeps_mute(scheme: str) -> None:
    with mute_server() as port:
        source = Live(f"{scheme}://127.0.0.1:{port}/x", LiveSettings(open_timeout_s=60))
        time.sleep(0.3)
        began_s = time.monotonic()
        source.close()
        assert time.monotonic() - began_s < CLOSE_S / 2


def test_closing_wakes_who_waits(camera: MjpegCamera, camera_url: str) -> None:
    source = Live(camera_url, LiveSettings(silent_s=60))
    next_frame(source)
    camera.silent = True
    while isinstance(source.take(0.3), LiveFrame):
        pass
    began_s = time.monotonic()
    threading.Timer(0.2, source.close).start()
    assert source.take(60) == End("the source was closed")
    assert time.monotonic() - began_s < CLOSE_S
    source.close()
    assert isinstance(source.take(60), End)
    assert source.stats.phase == "ended"


def test_closing_at_once_and_while_a_consumer_is_slow() -> None:
    for settings in (QUICK, LiveSettings(policy="block", queue_frames=1)):
        source = Live(LAVFI, settings)
        source.close()
        source = Live(LAVFI, settings)
        next_frame(source)
        time.sleep(0.2)
        began_s = time.monotonic()
        source.close()
        assert time.monotonic() - began_s < CLOSE_S
        assert source.stats.phase == "ended"
