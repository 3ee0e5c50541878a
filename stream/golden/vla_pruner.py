"""Golden files of VLA-Pruner: episodes of one camera, and the redundancy filter alone.

The method runs whole, as in a pipeline. Steps are judged one by one, with a history made from the
stored masks; closed loops also run freely, as far as the reference is stable and free of ties.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import Budget, PatchGrid, VisualTokens
from ..memory import Memory
from ..ops import picks, spread
from ..ops.history import AttentionHistory
from ..reducers.base import reduce_stage
from ..reducers.vla_pruner import SIGNAL_OF, STATE, Semantic, VLAPruner, query_rows
from ..signals import Signal, Signals
from .cases import Arrays, Case, differs, fitting, tensor

SETTING = r"(released|recency)_(f32|bf16)"
STEPS = re.compile(rf"(vp_{SETTING}_(last|prefill|text)_(open|closed)_k(\d+))_\w+")
GUIDE = re.compile(rf"guide_{SETTING}_(open|closed)_k(\d+)")
BASE = re.compile(r"base_(last|prefill|text)_k(\d+)_mask")
FILTER = re.compile(r"(red\d+)_\w+")
MODES: dict[str, Literal["released", "paper"]] = {"released": "released", "recency": "paper"}
DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"f32": "float32", "bf16": "bfloat16"}
FLOAT32_RTOL, BFLOAT16_STEP = 1e-5, 2.0**-7


def cases(arrays: Arrays) -> list[Case]:
    """All cases of a file; none if it holds no array of this method."""
    found: list[Case] = []
    for name in sorted({m[1] for m in map(FILTER.fullmatch, arrays) if m}):
        found += fitting(name, partial(_filter_case, name, arrays))
    for m in filter(None, map(BASE.fullmatch, arrays)):
        found += fitting(m[0], partial(_base_case, m, arrays))
    for m in filter(None, map(GUIDE.fullmatch, arrays)):
        found += fitting(m[0], partial(_guide_case, m, arrays))
    for m in {m[1]: m for m in map(STEPS.fullmatch, arrays) if m}.values():
        found += fitting(m[1], partial(_step_cases, m, arrays))
    if "attention_heads" in arrays:
        found += fitting("scores", lambda: _score_cases(arrays))
    return found


def _case(name: str, why: str, unstable: bool = False) -> Case:
    if why:
        return Case(name, "failed", why)
    return Case(name, "skipped" if unstable else "passed")


def _filter_case(name: str, arrays: Arrays) -> list[Case]:
    """Picks in order; of duplicated rows only as far as the reference still tells them apart."""
    fields = {k: arrays[f"{name}_{k}"] for k in ("x", "keep", "picks", "stable", "n_distinct")}
    x, keep, expected = tensor(fields["x"]), int(fields["keep"]), fields["picks"]
    everything = torch.ones(1, x.shape[0], dtype=torch.bool)
    ours = spread.farthest(x[None], everything, min(keep, x.shape[0]))[0]
    if x.shape[0] <= keep:
        ours = ours.sort().values
    if ours.numel() != expected.size or ours.unique().numel() != ours.numel():
        return [Case(name, "failed", f"{ours.unique().numel()} picks, expected {expected.size}")]
    distinct = int(fields["n_distinct"])
    if not fields["stable"]:
        return [Case(name, "skipped")]
    return [_case(name, differs("picks", ours[:distinct], expected[:distinct]))]


def _base_case(m: re.Match[str], arrays: Arrays) -> list[Case]:
    kept = picks.top(tensor(arrays[f"att_{m[1]}"]), int(m[2]))
    mask = torch.zeros(arrays[m[0]].shape, dtype=torch.bool).scatter_(-1, kept, True)
    return [_case(m[0].removesuffix("_mask"), differs("masks", mask, arrays[m[0]]))]


def _score_cases(arrays: Arrays) -> list[Case]:
    """Scores of every kind, recomputed from whole attention maps [t, heads, rows, rows]."""
    rows = tensor(arrays["attention_heads"]).mean(1)
    first, count, _ = (int(v) for v in arrays["layout"])
    stop, found = first + count, []
    for kind in get_args(Semantic):
        ours = rows[:, query_rows(kind, stop, rows.shape[1]), first:stop].mean(1)
        why = differs("scores", ours, arrays[f"att_{kind}"], rtol=FLOAT32_RTOL)
        found.append(_case(f"scores {kind}", why))
    ours = tensor(arrays["action_attention"]).mean((1, 2))
    why = differs("scores", ours, arrays["action_vectors"], rtol=FLOAT32_RTOL)
    return [*found, _case("scores action", why)]


@dataclass(frozen=True, slots=True)
class _Episode:
    """One stored episode, and the method set as its name says.

    score, vector: [t, n], semantic and action attention; visual: [t, n, d].
    """

    method: VLAPruner
    score: Tensor
    vector: Tensor
    visual: Tensor
    closed: bool

    @classmethod
    def of(cls, arrays: Arrays, setting: tuple[str, str], semantic: Any, loop: str) -> _Episode:
        window, gamma = arrays["params"]
        method = VLAPruner(
            mode=MODES[setting[0]],
            guide_dtype=DTYPES[setting[1]],
            semantic=semantic,
            window=int(window),
            gamma=float(gamma),
        )
        score, vector = tensor(arrays[f"att_{semantic}"]), tensor(arrays["action_vectors"])
        return cls(method, score, vector, tensor(arrays["visual"]), loop == "closed")

    @property
    def grid(self) -> PatchGrid:
        return PatchGrid(1, 1, self.vector.shape[1])

    def tokens(self, t: int) -> VisualTokens:
        """Tokens whose states say nothing: the method must read the input embeddings."""
        return VisualTokens.full(torch.zeros(self.grid.size, 1), self.grid, (float(t),))

    def keep(self, t: int, history: AttentionHistory, budget: int) -> Tensor:
        """Ascending places kept in step t, long [k]."""
        signals = Signals(
            {
                SIGNAL_OF[self.method.semantic]: self.score[t],
                Signal.INPUT_EMBEDDINGS: self.visual[t],
            }
        )
        memory = Memory(state={STATE: history})
        return reduce_stage(self.method, self.tokens(t), signals, Budget(budget), memory).anchor

    def guide(self, t: int, history: AttentionHistory) -> Tensor:
        """Smoothed action attention before step t, float32 [n]."""
        return self.method.guide([history], [float(t)], self.grid, "cpu")[0]

    def union(self, t: int, history: AttentionHistory, budget: int) -> Tensor:
        """The tokens that step t may keep, bool [n]."""
        place, score = torch.arange(self.grid.size)[None], self.score[t][None]
        union, _ = self.method.candidates(place, score, [history], [float(t)], self.grid, budget)
        return union.flatten()

    def after(self, t: int, history: AttentionHistory, kept: Tensor) -> AttentionHistory:
        index = kept if self.closed else torch.arange(self.grid.size)
        return history.push(self.vector[t][index], index, self.grid.size, time_s=float(t), epoch=0)

    def histories(self, mask: NDArray[Any]) -> Iterator[AttentionHistory]:
        """What is known before each step if the stored masks (u8 [t, n]) were kept."""
        history = AttentionHistory()
        for t, row in enumerate(mask):
            yield history
            history = self.after(t, history, torch.from_numpy(np.flatnonzero(row)))


def _guide_case(m: re.Match[str], arrays: Arrays) -> list[Case]:
    """Smoothed action attention; zero while warming up."""
    order, precision, loop, keep = m.groups()
    episode = _Episode.of(arrays, (order, precision), "last", loop)
    ours = torch.zeros_like(episode.vector)
    mask = arrays[f"vp_{order}_{precision}_last_{loop}_k{keep}_mask"]
    for t, history in enumerate(episode.histories(mask)):
        if len(history.glances) >= episode.method.window:
            ours[t] = episode.guide(t, history)
    rtol = FLOAT32_RTOL if precision == "f32" else BFLOAT16_STEP
    return [_case(m[0], differs("guides", ours, arrays[m[0]], rtol=rtol))]


def _step_cases(m: re.Match[str], arrays: Arrays) -> list[Case]:
    name, order, precision, semantic, loop, keep = m.groups()
    fields = {k: arrays[f"{name}_{k}"] for k in ("mask", "union", "pick", "stable", "tie")}
    episode = _Episode.of(arrays, (order, precision), semantic, loop)
    clean = (fields["stable"] == 1) & (fields["tie"] == 0)
    found = []
    for t, history in enumerate(episode.histories(fields["mask"])):
        step = {k: v[t] for k, v in fields.items()}
        if len(history.glances) < episode.method.window:
            why = differs("masks", torch.ones(episode.grid.size), step["mask"])
            why = why or differs("union", torch.tensor(0), step["union"])
            kept = episode.keep(t, history, int(keep))
            why = why or ("" if kept.numel() == episode.grid.size else "pruned while warming up")
        else:
            why = _step_differs(episode, t, history, int(keep), step, bool(clean[t]))
        found.append(_case(f"{name} step {t}", why, unstable=not clean[t]))
    if episode.closed:
        found.append(_free_run(f"{name} free", episode, int(keep), fields["mask"], clean))
    return found


def _step_differs(
    episode: _Episode, t: int, history: AttentionHistory, keep: int, step: Arrays, clean: bool
) -> str:
    """What is wrong with one step; where it is not clean, the kept set must lie in a union."""
    kept, expected = episode.keep(t, history, keep), tensor(np.flatnonzero(step["mask"]))
    if not kept.numel() == expected.numel() == keep:
        return f"{kept.numel()} tokens, stored are {expected.numel()}, the budget is {keep}"
    if not clean:
        may = _reaches_cut(episode.guide(t, history), keep) | _reaches_cut(episode.score[t], keep)
        inside = bool(may[kept].all()), bool(may[expected].all())
        return "" if all(inside) else f"kept sets (ours, stored) in a valid union: {inside}"
    union = episode.union(t, history, keep)
    why = differs("kept", kept, expected.numpy())
    why = why or differs("union", union.sum(), step["union"])
    if not why and step["union"] > keep:
        order = spread.farthest(episode.visual[t][None], union[None], keep)[0]
        why = differs("picks", order, step["pick"])
    return why


def _reaches_cut(score: Tensor, k: int) -> Tensor:
    """bool [n]: what some choice among equal scores would count as top k."""
    return score >= score.topk(k).values[-1]


def _free_run(
    name: str, episode: _Episode, keep: int, mask: NDArray[Any], clean: NDArray[np.bool_]
) -> Case:
    """The loop on its own masks: equal to the stored ones up to the first step not clean."""
    history, compared = AttentionHistory(), 0
    for t, row in enumerate(mask):
        if not clean[t]:
            break
        kept = episode.keep(t, history, keep)
        why = differs(f"kept of step {t}", kept, np.flatnonzero(row))
        if why:
            return Case(name, "failed", why)
        compared += t >= episode.method.window
        history = episode.after(t, history, kept)
    return Case(name, "passed" if compared else "skipped")
