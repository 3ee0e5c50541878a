"""Pruning on a user's own model, in two lines, removed without a trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from stream.data import Budget
from stream.errors import AttachError, BudgetError, ConfigError
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.registry import build_reducer
from stream.signals import Signal, Signals

from .adapter import SaliencyTap, adapter_for
from .hooks import Positions, ReductionHooks
from .prefill import VideoSpan
from .vla.base import VLAPolicy
from .vla.families import family_of, is_lerobot
from .vla.flow_attach import FlowAttachment
from .vla.policy_attach import PolicyAttachment


class Attachment:
    """A reducer attached to a model; use as a context manager or call `detach`.

    plans: what became of the tokens of each video of the last prefill, by sequence.
    lengths: tokens, text included, that entered each decoder layer of the last prefill.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reducer: Reducer,
        retain: float | None,
        budget: int | None,
        positions: Positions,
        seed: int,
    ) -> None:
        self._adapter = adapter_for(model)
        self._adapter.check_fit(reducer)
        if (retain is None) == (budget is None):
            raise BudgetError(
                f"retain is {retain} and budget is {budget}; give exactly one of them."
            )
        self._retain, self._tokens, self._seed = retain, budget, seed
        self._hooks = ReductionHooks(
            self._adapter.text_model, self._adapter.layers, reducer.stages, positions
        )
        self._needs_saliency = any(Signal.SALIENCY in s.needs for s in reducer.stages)
        self._tap = SaliencyTap()
        self._stack = ExitStack()

    @property
    def plans(self) -> list[list[Plan]]:
        return [[span.plan for span in row] for row in self._hooks.rows]

    @property
    def lengths(self) -> list[int]:
        return self._hooks.lengths()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._hooks)
            if self._needs_saliency:
                stack.enter_context(self._adapter.saliency(self._tap))
            hook = self._adapter.model.model.register_forward_pre_hook(
                self._announce, with_kwargs=True
            )
            stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Remove every hook and restore the model's attention implementation."""
        self._stack.close()

    def _announce(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            raise AttachError("The model is in training mode; call model.eval() before pruning.")
        self._hooks.infer_positions(kwargs.get("position_ids") is None)
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return
        self._hooks.forget()
        places = self._adapter.places(kwargs)
        if not any(places):
            return
        self._tap.clear()
        grids = [place.grid for row in places for place in row]
        pooled: list[Tensor] = []

        def saliency(video: int) -> Tensor:
            if not pooled:
                pooled.extend(self._adapter.pooled_saliency(self._tap.take(), grids))
            return pooled[video]

        rows: list[list[VideoSpan]] = []
        video = 0
        for row in places:
            spans = []
            for place in row:
                n = place.grid.size
                if place.slots.numel() != n:
                    raise AttachError(
                        f"The prompt holds {place.slots.numel()} placeholders for a video of {n} "
                        "tokens; pass whole prompts, with `prefill_chunk_size` unset."
                    )
                spans.append(
                    VideoSpan(
                        slots=place.slots,
                        grid=place.grid,
                        pts_s=place.pts_s,
                        budget=self._budget(n),
                        plan=Plan.identity(n, place.slots.device),
                        signals=Signals({Signal.SALIENCY: lambda v=video: saliency(v)}),  # type: ignore[misc]
                        memory=Memory(seed=self._seed),
                    )
                )
                video += 1
            rows.append(spans)
        text_from = min(int(row[-1].slots[-1]) + 1 for row in places if row)
        self._hooks.expect(rows, text_from)

    def _budget(self, n: int) -> Budget:
        if self._retain is not None:
            return Budget.ratio(self._retain, of=n)
        return Budget(min(self._tokens or 0, n))


@dataclass(frozen=True, slots=True)
class Kind:
    """What `attach` does with one kind of model.

    fits: whether a model is of it. default: its usual reducer. attached: from the model, the
    reducer and `attach`'s other arguments.
    """

    fits: Callable[[Any], bool]
    default: str
    attached: Callable[..., Attachment | FlowAttachment | PolicyAttachment]


def _video(
    model: Any, reducer: Reducer, positions: Positions, dt_s: float, **rest: Any
) -> Attachment:
    return Attachment(model, reducer, positions=positions, **rest)


def _lerobot(
    model: Any, reducer: Reducer, positions: Positions, dt_s: float, **rest: Any
) -> FlowAttachment:
    return FlowAttachment(family_of(model), reducer, dt_s=dt_s, **rest)


def _policy(
    model: Any, reducer: Reducer, positions: Positions, dt_s: float, **rest: Any
) -> PolicyAttachment:
    return PolicyAttachment(model, reducer, **rest)


KINDS = (
    Kind(is_lerobot, "vla_pruner", _lerobot),
    Kind(lambda model: isinstance(model, VLAPolicy), "vla_pruner", _policy),
    Kind(lambda model: True, "holitom", _video),
)
"""The first one that fits is taken; the last says itself what it supports."""


def attach(
    model: Any,
    reducer: str | Reducer | None = None,
    *,
    retain: float | None = None,
    budget: int | None = None,
    positions: Positions = "keep",
    seed: int = 0,
    dt_s: float = 1 / 30,
    **settings: Any,
) -> Any:
    """Prune the visual tokens of a model while the block runs.

        with attach(model, "holitom", retain=0.15):  # a transformers video LLM
            model.generate(**inputs)

        with attach(policy, "vla_pruner", budget=64):  # a lerobot policy
            policy.select_action(batch)

        with attach(policy, "vla_pruner", budget=128) as pruned:  # of `policies.vla.load`
            pruned.act(observation)

    reducer: a name (`foveate methods` lists them) with its settings, or a Reducer; default is
    `holitom` for a video LLM and `vla_pruner` for a policy.
    retain: share of the visual tokens to keep, or budget: their number; of each video, or of all
    cameras of a policy together.
    positions: of video LLMs; `keep` lets every token stand where its anchor stood, `renumber`
    closes the gaps. dt_s: of lerobot's policies; control period, by which past steps age when the
    batches hold no `timestamp`.

    Returns an `Attachment`, a `FlowAttachment` or a `PolicyAttachment`.
    """
    if settings and isinstance(reducer, Reducer):
        raise ConfigError(
            f"{type(reducer).__name__} is built already, so {sorted(settings)} cannot be set; "
            "give its name instead."
        )
    kind = next(kind for kind in KINDS if kind.fits(model))
    if not isinstance(reducer, Reducer):
        reducer = build_reducer(reducer or kind.default, **settings)
    return kind.attached(
        model, reducer, positions=positions, dt_s=dt_s, retain=retain, budget=budget, seed=seed
    )
