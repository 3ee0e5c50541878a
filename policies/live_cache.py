"""What a language model remembers of one stream: a KV cache that follows the stream's window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from stream.live.values import joined
from stream.pipeline import ReducedVideo, Reply

from . import kvcache

if TYPE_CHECKING:
    from .reasoner import VideoReasoner


class LiveCache:
    """System prompt and reduced pieces of a stream, laid out as an offline prompt of the same
    pieces would be, prefilled as they come.

    Positions count from the window's first frame on. When pieces leave, the keys of what follows
    are turned to their new positions. `rotate` keeps what the later pieces took in when they were
    prefilled, from those that left too; `refill` prefills the rest anew, which equals a window that
    never held what left, and is the only way for rotary embeddings that cannot be turned.

    Where a family's positions of the first frames depend on how many follow, the window is
    prefilled anew as it grows (transformers 5.5 lays Qwen2.5-VL's videos out so).
    """

    def __init__(self, reasoner: VideoReasoner, reanchor: str) -> None:
        self._reasoner = reasoner
        self._text_model = reasoner.adapter.text_model
        self._turns = reanchor == "rotate" and kvcache.can_turn(self._text_model)
        self._cache = DynamicCache(config=self._text_model.config)
        self._position: Tensor | None = None
        self._videos: list[ReducedVideo] = []

    @property
    def tokens(self) -> int:
        """Cached tokens, the system prompt included."""
        return self._cache.get_seq_length()

    @torch.inference_mode()
    def hold(self, videos: Sequence[ReducedVideo]) -> None:
        """Remember exactly these pieces; see `stream.live.session.Cache`."""
        kept = [v for v in self._videos if any(v is w for w in videos)]
        if len(kept) < len(self._videos):
            if self._turns and kept:
                self._leave(kept)
            else:
                self._cache = DynamicCache(config=self._text_model.config)
                self._position = None
        self._videos = list(videos)
        if videos:
            self._extend()

    @torch.inference_mode()
    def answer(self, questions: Sequence[str], tail: ReducedVideo | None) -> Reply:
        """Greedy answers on a branch of the cache, which stays as it is."""
        video = joined([*self._videos, *([tail] if tail else [])])
        return self._reasoner.answer(video, questions, self._cache if self._videos else None)

    def _extend(self) -> None:
        """Prefill what is not cached yet."""
        prompt = self._reasoner.prompt(joined(self._videos), [""])
        stop = prompt.text_from
        position = prompt.position_ids[..., :stop]
        have = self._cache.get_seq_length()
        if self._position is not None and not position[..., :have].equal(
            self._position[..., :have]
        ):
            self._cache, have = DynamicCache(config=self._text_model.config), 0
        self._position, new = position, slice(have, stop)
        if new.start < new.stop:
            self._text_model(
                inputs_embeds=prompt.embeds[:, new],
                attention_mask=prompt.mask[:, :stop],
                position_ids=position[..., new],
                past_key_values=self._cache,
                use_cache=True,
            )

    def _leave(self, kept: list[ReducedVideo]) -> None:
        """Take the rows of all other pieces out and move the rest up."""
        assert self._position is not None
        first = self._cache.get_seq_length() - sum(v.plan.k for v in self._videos)
        rows, start = [torch.arange(first)], first
        for video in self._videos:
            if any(video is k for k in kept):
                rows.append(torch.arange(start, start + video.plan.k))
            start += video.plan.k
        index = torch.cat(rows).to(self._position.device)
        kvcache.keep_rows(self._cache, index)
        prompt = self._reasoner.prompt(joined(kept), [""])
        shift = prompt.position_ids[..., : index.numel()] - self._position[..., index]
        kvcache.turn(self._text_model, self._cache, shift[1:, 0] if shift.ndim == 3 else shift[0])
        self._position = prompt.position_ids[..., : index.numel()]
