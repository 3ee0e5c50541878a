"""Requests and replies: OpenAI's chat completions as far as they go, and what foveate adds.

What cannot be honoured and would change what a client reads is refused; other fields that are not
used are named in the reply (`foveate.ignored`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from stream.live.values import Mode

from .limits import writable

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


def _characters(text: str) -> str:
    if writable(text) != text:
        raise ValueError("the text holds half a surrogate pair, which is no character")
    return text


Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(_characters)]


class _Body(BaseModel):
    """Values as JSON has them: "3" is no number."""

    model_config = ConfigDict(strict=True)


class _Exact(_Body):
    model_config = ConfigDict(extra="forbid")


class Url(_Body):
    url: Text = Field(min_length=1)


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: Url


class VideoPart(_Body):
    type: Literal["video_url"]
    video_url: Url


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]


class StreamOptions(_Body):
    include_usage: bool = False


class ResponseFormat(_Body):
    type: Literal["text"]


class Looking(_Exact):
    """How to look.

    retain: share of the visual tokens to keep. frames: how many, evenly spaced; fps: instead, that
    many a second. span_s: of an attached stream, seconds of its media time to answer about, from
    the archive if need be. recall: instead, the parts of all it remembers that matter most.
    """

    retain: float | None = Field(default=None, gt=0, le=1)
    frames: int | None = Field(default=None, ge=1)
    fps: float | None = Field(default=None, gt=0, le=240)
    span_s: Annotated[tuple[Finite, Finite], Field(strict=False)] | None = None
    recall: bool = False


class ChatRequest(_Body):
    """`POST /v1/chat/completions`. Answers are greedy."""

    model_config = ConfigDict(extra="allow")

    model: Text
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    stop: None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    foveate: Looking = Looking()

    @property
    def ignored(self) -> list[str]:
        """Fields that are not used, the first few of them."""
        return [writable(name[:64]) for name in sorted(self.model_extra or {})[:32]]


class StreamRequest(_Exact):
    """`POST /v1/streams`: attach a camera. fps: frames looked at, a second."""

    name: Name
    source: Text = Field(min_length=1, max_length=4096)
    mode: Mode | None = None
    fps: float | None = Field(default=None, gt=0, le=60)
    tokens_per_s: float | None = Field(default=None, gt=0, le=1e5)
    window_frames: int | None = Field(default=None, ge=1)


class VisualTokens(BaseModel):
    """Visual tokens before the reduction, and those that reached the model."""

    visual_tokens_in: int
    visual_tokens_out: int


class Usage(BaseModel):
    """prompt_tokens: what the model read, visual tokens after their reduction."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: VisualTokens


class Evidence(BaseModel):
    """What an answer rests on and what it cost.

    tokens_in, tokens_out: visual tokens, before and after. retain: their ratio. evidence_s: first
    and last time of each piece seen. frame_age_s: of an attached stream, how old its newest frame
    was. recalled: pieces that came back from its archive. confidence: mean probability of the
    answer's tokens. ignored: fields of the request that were not used.
    """

    tokens_in: int
    tokens_out: int
    retain: float
    evidence_s: list[tuple[float, float]]
    frame_age_s: float | None
    recalled: int
    confidence: float
    timings_ms: dict[str, float]
    notes: str
    ignored: list[str]


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int = 0
    message: Said
    finish_reason: Literal["stop", "length"]


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    foveate: Evidence


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "foveate"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class StreamCard(BaseModel):
    """An attached camera, without its secrets. frame_age_s: of the newest frame that was decoded.
    lag_s: quantiles of the time from a frame's arrival until the model's side has taken it in."""

    name: str
    object: Literal["stream"] = "stream"
    source: str
    phase: str
    said: str
    frame_age_s: float | None
    mode: str
    counts: dict[str, int]
    lag_s: dict[str, float]


class StreamList(BaseModel):
    object: Literal["list"] = "list"
    data: list[StreamCard]


class Gone(BaseModel):
    name: str
    object: Literal["stream"] = "stream"
    deleted: bool = True


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str
    streams: int
    requests: int


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorFields
