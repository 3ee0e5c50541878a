"""From a chat request to an answer: what is asked, what is seen, and the work of the model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from policies.reasoner import VideoReasoner
from stream.data import Answer, Budget, Frame
from stream.errors import FoveateError
from stream.live.session import Session
from stream.memory import Memory
from stream.pipeline import CHUNK_FRAMES, EncodedVideo, Timings, chunked, reduce_video, timed
from stream.reducers.base import Reducer
from stream.sources import Fps, Sampling, Uniform
from stream.sources.images import IMAGE_PERIOD_S, read_image
from stream.sources.video_file import VideoFile

from .limits import Limits, Refusal
from .media import Medium, Reader
from .schemas import ChatRequest, ImagePart, TextPart

if TYPE_CHECKING:
    from .media import Kind

STREAM = "stream:"


@dataclass(frozen=True, slots=True)
class Asked:
    """A chat request, understood.

    urls: kind and place of what is to be seen; or stream: the name of an attached one.
    """

    question: str
    urls: tuple[tuple[Kind, str], ...]
    stream: str | None
    retain: float
    sampling: Sampling
    new_tokens: int
    span_s: tuple[float, float] | None
    recall: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer and all that a reply tells of it; see `schemas.Evidence`."""

    answer: Answer
    text_tokens: int
    new_tokens: int
    tokens_in: int
    tokens_out: int
    evidence_s: tuple[tuple[float, float], ...]
    timings_ms: Timings
    frame_age_s: float | None = None
    recalled: int = 0
    notes: str = ""
    finish: Literal["stop", "length"] = "stop"


class Call:
    """One answer under way, as the model's thread sees it.

    say: is told the answer so far. stop: set once nobody waits for it any more.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.stop = threading.Event()
        self.made_s = time.perf_counter()

    def check(self) -> None:
        if self.stop.is_set():
            raise Refusal(499, "client_gone", "The client left.")


def understand(body: ChatRequest, limits: Limits, retain: float, frames: int) -> Asked:
    """retain, frames: where the request states none. Raises Refusal."""
    turns: list[tuple[str, str]] = []
    urls: list[tuple[Kind, str]] = []
    for message in body.messages:
        parts = [message.content] if isinstance(message.content, str) else message.content
        texts = []
        for part in parts:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, TextPart):
                texts.append(part.text)
            elif isinstance(part, ImagePart):
                urls.append(("image", part.image_url.url))
            else:
                urls.append(("video", part.video_url.url))
        turns.append((message.role, "\n".join(texts).strip()))
    look = body.foveate
    frames = look.frames or frames
    if max(frames, len(urls)) > limits.frames:
        raise Refusal(
            400,
            "too_many_frames",
            f"{max(frames, len(urls))} frames are asked for; at most {limits.frames} are allowed.",
            "foveate.frames",
        )
    new_tokens = body.max_completion_tokens or body.max_tokens or limits.new_tokens
    stream = _stream_of(urls)
    if stream is None and (look.span_s or look.recall):
        raise Refusal(400, "not_a_stream", "span_s and recall are for attached streams.", "foveate")
    return Asked(
        _question(turns, limits),
        () if stream else tuple(urls),
        stream,
        look.retain or retain,
        Fps(look.fps, frames) if look.fps else Uniform(frames),
        min(new_tokens, limits.new_tokens),
        look.span_s,
        look.recall,
    )


def _question(turns: Sequence[tuple[str, str]], limits: Limits) -> str:
    """One text: instructions, then what was said before, then the question."""
    texts = [(role, text) for role, text in turns if text]
    if sum(len(text) for _, text in texts) > limits.text_chars:
        raise _wrong(
            "text_too_long", f"The messages have more than {limits.text_chars:,} characters."
        )
    rules = [text for role, text in texts if role in ("system", "developer")]
    said = [(role, text) for role, text in texts if role in ("user", "assistant")]
    if not said or said[-1][0] != "user":
        raise _wrong("no_question", "The last message must be the user's and hold a text.")
    if len(said) > 1:
        rules += [f"{role}: {text}" for role, text in said[:-1]]
    return "\n".join([*rules, said[-1][1]])


def _stream_of(urls: Sequence[tuple[Kind, str]]) -> str | None:
    """The one stream that is asked about; None if it is files."""
    streams = [url for _, url in urls if url.startswith(STREAM)]
    videos = [url for kind, url in urls if kind == "video"]
    if not urls:
        raise _wrong(
            "nothing_to_see",
            "The messages show nothing: add an image_url or a video_url (data:, file://, or "
            f"{STREAM}NAME for an attached camera).",
        )
    if (videos or streams) and len(urls) > 1:
        raise _wrong(
            "too_many_media", "Show one video, one stream, or pictures; pictures count as frames."
        )
    return streams[0].removeprefix(STREAM) if streams else None


def _wrong(code: str, message: str) -> Refusal:
    return Refusal(400, code, message, "messages")


class Answerer:
    """The model's side of requests; `about_stream` and `about_media` run in the model's thread."""

    def __init__(
        self,
        reasoner: VideoReasoner,
        reducer: Reducer,
        session: Session,
        reader: Reader,
        limits: Limits,
        seed: int,
    ) -> None:
        self._reasoner, self._reducer, self._session = reasoner, reducer, session
        self._reader, self._limits, self._seed = reader, limits, seed

    def gather(self, asked: Asked, folder: Path) -> list[Medium]:
        """What is to be seen, on disk and checked; may take long, touches no model, nor its
        tokenizer, which is for one thread as well."""
        left = self._limits.body_bytes
        media = []
        for i, (kind, url) in enumerate(asked.urls):
            target = folder / str(i)
            media.append(self._reader.read(kind, url, target, left))
            left -= target.stat().st_size if target.exists() else 0
        return media

    def about_stream(self, asked: Asked, call: Call) -> Outcome:
        call.check()
        self._check_text(asked.question)
        name = asked.stream or ""
        if self._session.newest_s(name) is None:
            raise Refusal(
                409,
                "stream_not_ready",
                f"The stream '{name}' has given no frame yet; see /v1/streams, and ask again.",
            )
        held = sum(part.video.plan.k for part in self._session.window(name))
        self._check_context(asked, held)
        waited_ms = (time.perf_counter() - call.made_s) * 1e3
        with self._following(asked, call):
            live = self._session.ask(
                name, [asked.question], span_s=asked.span_s, recall=asked.recall
            )
        plan = live.reply.plans[0]
        return self._outcome(
            asked,
            live.reply.answers[0],
            plan.n,
            plan.k,
            live.spans_s,
            {"queue": waited_ms} | live.reply.timings_ms,
            frame_age_s=live.age_s(time.monotonic()),
            recalled=live.recalled,
        )

    def about_media(self, asked: Asked, media: Sequence[Medium], call: Call) -> Outcome:
        call.check()
        self._check_text(asked.question)
        timings: Timings = {"queue": (time.perf_counter() - call.made_s) * 1e3}
        parts: list[EncodedVideo] = []
        notes: list[str] = []
        try:
            chunks = chunked(self._frames(asked, media, notes), CHUNK_FRAMES)
            while True:
                with timed(timings, "decode"):
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                call.check()
                with timed(timings, "encode"):
                    parts.append(self._reasoner.encode(chunk))
            call.check()
            with timed(timings, "reduce"):
                encoded = EncodedVideo.joined(parts)
                budget = Budget.ratio(asked.retain, of=encoded.grid.size)
                video = reduce_video(encoded, self._reducer, budget, Memory(seed=self._seed))
        except Refusal:
            raise
        except (FoveateError, OSError, ValueError, SyntaxError) as error:
            raise _wrong("unreadable_media", _without_paths(str(error), media)) from None
        self._check_context(asked, video.plan.k)
        with self._following(asked, call):
            reply = self._reasoner.answer(video, [asked.question])
        evidence = tuple((video.pts_s[s.start], video.pts_s[s.stop - 1]) for s in video.segments)
        return self._outcome(
            asked,
            reply.answers[0],
            video.plan.n,
            video.plan.k,
            evidence,
            timings | reply.timings_ms,
            notes=_without_paths("; ".join(notes), media),
        )

    def _frames(self, asked: Asked, media: Sequence[Medium], notes: list[str]) -> Iterator[Frame]:
        """Decoded as they are taken; each is held against the limit on pixels."""
        for i, medium in enumerate(media):
            if medium.kind == "image":
                yield self._fit(Frame(read_image(medium.path), i * IMAGE_PERIOD_S, i), medium)
                continue
            with VideoFile(medium.path) as source:
                for frame in source.read(asked.sampling):
                    yield self._fit(frame, medium)
                if source.report.said:
                    notes.append(source.report.said)

    def _fit(self, frame: Frame, medium: Medium) -> Frame:
        height, width = frame.image.shape[:2]
        self._reader.check_pixels(width, height, medium.shown)
        return frame

    def _following(self, asked: Asked, call: Call) -> AbstractContextManager[None]:
        def listener(token_ids: Sequence[int]) -> bool:
            call.say(self._reasoner.text_of(token_ids))
            return call.stop.is_set()

        return self._reasoner.generating(asked.new_tokens, listener)

    def _check_text(self, question: str) -> None:
        if found := self._reasoner.control_tokens(question):
            raise _wrong(
                "control_tokens",
                f"The text holds {', '.join(found)}, which this model does not take as text; "
                "leave it out.",
            )

    def _check_context(self, asked: Asked, visual: int) -> None:
        needs = self._reasoner.text_tokens(asked.question) + visual + asked.new_tokens
        if needs > self._reasoner.context_tokens:
            raise _wrong(
                "context_length_exceeded",
                f"{needs} tokens are needed; this model takes {self._reasoner.context_tokens}. "
                "Ask for fewer frames, a smaller share (foveate.retain), or less text.",
            )

    def _outcome(
        self,
        asked: Asked,
        answer: Answer,
        tokens_in: int,
        tokens_out: int,
        evidence_s: Sequence[tuple[float, float]],
        timings_ms: Timings,
        **more: Any,
    ) -> Outcome:
        return Outcome(
            answer,
            self._reasoner.text_tokens(asked.question),
            len(answer.token_ids),
            tokens_in,
            tokens_out,
            tuple(evidence_s),
            timings_ms,
            finish="length" if len(answer.token_ids) >= asked.new_tokens else "stop",
            **more,
        )


def _without_paths(text: str, media: Sequence[Medium]) -> str:
    for medium in media:
        text = text.replace(str(medium.path), medium.shown)
    return text
