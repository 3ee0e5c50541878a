"""lerobot's flow policies with a reducer attached: against the slow truth, and in an episode."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from policies.attach import attach
from policies.vla.flow_attach import FlowAttachment
from stream.data import Budget, VisualTokens
from stream.errors import AttachError, BudgetError, SignalError
from stream.memory import Memory
from stream.ops.history import AttentionHistory
from stream.plan import Plan
from stream.reducers.base import Reducer, Site
from stream.reducers.vla_pruner import STATE
from stream.registry import build_reducer, reducer_names
from stream.signals import Signal, Signals
from tests.policies.vla import lerobot_models as models
from tests.policies.vla.lerobot_models import BUILDERS, CAMERAS, KEYS, PER_CAMERA, STEPS, Truth

N = len(CAMERAS) * PER_CAMERA
DEPTH = 6
METHODS: list[dict[str, Any]] = [
    {"reducer": "vla_pruner"},
    {"reducer": "vla_pruner", "layer": None},
    {"reducer": "vla_pruner", "semantic": "prefill", "layer": 1},
    {"reducer": "fastv"},
    {"reducer": "random_keep"},
    {"reducer": "uniform"},
]


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def policy(request: pytest.FixtureRequest) -> Any:
    return BUILDERS[request.param]()


@pytest.fixture(autouse=True)
def _begin(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "policy" in request.fixturenames:
        request.getfixturevalue("policy").reset()


def act(policy: Any, batch: dict[str, Any] | None = None, **kwargs: Any) -> Tensor:
    batch = batch or models.batch()
    actions: Tensor = policy.predict_action_chunk(
        dict(batch), noise=models.noise(len(batch[KEYS[0]])), **kwargs
    )
    return actions


def dropped(plan: Plan) -> Tensor:
    gone = torch.ones(plan.n, dtype=torch.bool)
    gone[plan.anchor] = False
    return gone.nonzero().squeeze(-1)


def layer_of(method: dict[str, Any]) -> int:
    default = {"vla_pruner": 3, "fastv": 2}.get(method["reducer"], 0)
    return method.get("layer", default) or 0


def history(held: FlowAttachment, row: int = 0) -> AttentionHistory:
    memories = held._episode.memories
    memory = memories[row] if memories else Memory()
    found: AttentionHistory = memory.state.get(STATE, AttentionHistory())
    return found


# --- against the slow truth


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_all_tokens_give_bit_identical_actions(policy: Any, method: dict[str, Any]) -> None:
    with models.watched(policy) as plain:
        expected = act(policy)
    with attach(policy, **method, retain=1.0), models.watched(policy) as held:
        assert torch.equal(act(policy), expected)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, held, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_dropping_equals_hiding_in_every_flow_step(policy: Any, method: dict[str, Any]) -> None:
    with attach(policy, **method, budget=10) as attached, models.watched(policy) as held:
        for _ in range(3):
            del held[:]
            actions = act(policy)
    plan, layer = attached.plans[0], layer_of(method)
    assert plan.k == 10
    text = attached.lengths[-1] - 10
    assert attached.lengths == [N + text] * layer + [10 + text] * (DEPTH - layer)
    truth = Truth(policy, {layer: dropped(plan)})
    with truth.running(), models.watched(policy) as full:
        expected = act(policy)
    assert len(held) == len(full) == STEPS
    for (mine, _), (theirs, _) in zip(held, full, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(actions, expected, atol=1e-5, rtol=0)
    with attach(policy, **method, retain=1.0):
        assert (act(policy) - actions).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS[:2], ids=str)
def test_cache_lengths_are_constant_over_the_flow_steps(
    policy: Any, method: dict[str, Any]
) -> None:
    with attach(policy, **method, budget=10) as attached, models.watched(policy) as held:
        act(policy)
    assert [lengths for _, lengths in held] == [attached.lengths] * STEPS


def test_a_padded_prefix_keeps_the_expert_where_it_stood(policy: Any) -> None:
    """The instruction's padding stands behind the dropped places, so slices would be wrong."""
    batch = models.batch()
    batch["observation.language.attention_mask"][:, 4:] = False
    with attach(policy, "uniform", budget=7) as attached:
        actions = act(policy, batch)
    with Truth(policy, {0: dropped(attached.plans[0])}).running():
        torch.testing.assert_close(actions, act(policy, batch), atol=1e-5, rtol=0)


ROWS = {Signal.LAST_ROW: "last", Signal.PREFILL_ROWS: "prefill", Signal.TEXT_ROWS: "text"}
SEEN: dict[Signal, Tensor] = {}


class Listener(Reducer):
    """Notes what it is told, and keeps the first tokens."""

    needs: ClassVar[frozenset[Signal]] = frozenset(ROWS)

    layer: int | None = None

    @property
    def site(self) -> Site:
        return Site(self.layer)

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        SEEN.update({signal: signals[signal].clone() for signal in ROWS})
        return Plan.keep(torch.arange(budget.tokens), tokens.n)


@pytest.mark.parametrize("layer", [None, 3])
def test_signals_are_the_models_own_attention(policy: Any, layer: int | None) -> None:
    with Truth(policy).running() as truth:
        act(policy)
    with attach(policy, Listener(layer=layer), budget=5):
        act(policy)
    weights = truth.prefix[layer - 1 if layer else 0].mean(0)
    for signal, semantic in ROWS.items():
        own = weights[rows_of(policy, semantic)].mean(0)[:N]
        torch.testing.assert_close(SEEN[signal], own, atol=1e-6, rtol=0)


def rows_of(policy: Any, semantic: str) -> list[int]:
    """Rows of a prefix of N visual tokens, 7 words, 2 padded ones and, in SmolVLA, the state."""
    words = list(range(N, N + 7))
    behind = [N + 9] if policy.config.type == "smolvla" else []
    if semantic == "last":
        return [(words + behind)[-1]]
    if semantic == "prefill":
        return [*range(N), *words, *behind]
    return (words + behind)[1:-1]


def test_the_history_is_the_experts_own_attention(policy: Any) -> None:
    with attach(policy, "vla_pruner", layer=2, budget=10) as held:
        act(policy)
        glance = history(held).glances[-1]
        kept = held.plans[0].anchor
    assert glance.seen.nonzero().squeeze(-1).tolist() == kept.tolist()
    with Truth(policy, {2: dropped(held.plans[0])}).running() as truth:
        act(policy)
    rows = slice(-models.CHUNK, None)
    looked = torch.stack([truth.expert[layer][rows].mean(0) for layer in range(3, DEPTH)]).mean(0)
    torch.testing.assert_close(glance.value[kept], looked[kept], atol=1e-6, rtol=0)


def test_every_reducer_that_fits_runs(policy: Any) -> None:
    expected = act(policy)
    for name in reducer_names():
        try:
            held = attach(policy, name, budget=10)
        except AttachError:
            continue
        with attach(policy, name, retain=1.0):
            drops_anyway = any(s.keeps(N, Budget(N)) < N for s in build_reducer(name).stages)
            assert torch.equal(act(policy), expected) or drops_anyway, name
        with held:
            for _ in range(2):
                assert torch.isfinite(act(policy)).all(), name


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_published_modes_warm_up_first(policy: Any, mode: str) -> None:
    with attach(policy, "vla_pruner", budget=10, mode=mode) as held:
        kept = []
        for _ in range(5):
            act(policy)
            kept.append(held.plans[0].k)
    assert kept == [N, N, N, 10, 10]


@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_towers_in_half_precision(kind: str) -> None:
    """As checkpoints have them: the towers in bfloat16, the projections around them not."""
    policy = BUILDERS[kind](**({} if kind == "smolvla" else {"dtype": "bfloat16"}))
    if kind == "smolvla":
        policy.model.vlm_with_expert.vlm.to(torch.bfloat16)
    expected = act(policy)
    with attach(policy, "vla_pruner", retain=1.0):
        assert torch.equal(act(policy), expected)
    for layer in (None, 3):
        with attach(policy, "vla_pruner", budget=10, layer=layer) as held:
            act(policy)
            actions = act(policy)
        with Truth(policy, {layer or 0: dropped(held.plans[0])}).running():
            torch.testing.assert_close(actions, act(policy), atol=0.02, rtol=0)


# --- cameras


def test_a_missing_camera_is_dropped_without_loss(policy: Any) -> None:
    whole, batch = models.batch(), models.batch(cameras=("left", "right"))
    if policy.config.type == "smolvla":
        batch = whole | {f"{KEYS[1]}_padding_mask": torch.zeros(1, dtype=torch.bool)}
    expected = act(policy, batch)
    assert not torch.equal(expected, act(policy, whole))
    with attach(policy, "vla_pruner", retain=1.0) as held:
        torch.testing.assert_close(act(policy, batch), expected, atol=1e-6, rtol=0)
    assert held.plans[0].k == 2 * PER_CAMERA
    assert held.lengths[0] < N
    assert set((held.plans[0].anchor // PER_CAMERA).tolist()) == {0, 2}


def test_a_camera_that_drops_out_and_returns_keeps_its_place(policy: Any) -> None:
    some = models.batch(cameras=("left", "right"))
    with attach(policy, "vla_pruner", budget=12) as held:
        act(policy)
        act(policy, some)
        assert set((held.plans[0].anchor // PER_CAMERA).tolist()) <= {0, 2}
        assert held.plans[0].k == 12
        assert len(history(held).glances) == 2
        act(policy)
    with Truth(policy, {3: dropped(held.plans[0])}).running():
        expected = act(policy)
    with attach(policy, "vla_pruner", budget=12) as held:
        act(policy)
        act(policy, some)
        torch.testing.assert_close(act(policy), expected, atol=1e-5, rtol=0)


def test_no_camera_at_all_is_an_error() -> None:
    policy = models.smolvla()
    batch = models.batch(cameras=("left",))
    batch[f"{KEYS[0]}_padding_mask"] = torch.zeros(1, dtype=torch.bool)
    with attach(policy, budget=5), pytest.raises(AttachError, match="No camera gave a picture"):
        act(policy, batch)


def test_a_camera_missing_in_half_of_a_batch_is_an_error() -> None:
    policy = models.smolvla()
    batch = models.batch(rows=2)
    batch[f"{KEYS[0]}_padding_mask"] = torch.tensor([True, False])
    with attach(policy, budget=5), pytest.raises(AttachError, match="missing in some sequences"):
        act(policy, batch)


def test_pictures_framed_by_tokens_keep_their_frames() -> None:
    policy = models.smolvla(add_image_special_tokens=True)
    batch = models.batch()
    batch[f"{KEYS[1]}_padding_mask"] = torch.zeros(1, dtype=torch.bool)
    expected = act(policy, batch)
    with attach(policy, "uniform", retain=1.0):
        assert torch.equal(act(policy, batch), expected)
    with attach(policy, "uniform", budget=6) as held:
        actions = act(policy, batch)
    slots = torch.cat([torch.arange(s, s + PER_CAMERA) for s in (2, 2 + 2 * (PER_CAMERA + 3))])
    kept = held.plans[0].anchor
    kept = torch.where(kept >= 2 * PER_CAMERA, kept - PER_CAMERA, kept)
    gone = torch.ones(slots.numel(), dtype=torch.bool)
    gone[kept] = False
    with Truth(policy, {0: slots[gone]}).running():
        torch.testing.assert_close(actions, act(policy, batch), atol=1e-5, rtol=0)


def test_nan_in_a_camera_is_an_error_that_leaves_the_episode_usable(policy: Any) -> None:
    batch = models.batch()
    batch[KEYS[0]] = torch.full_like(batch[KEYS[0]], torch.nan)
    with attach(policy, "vla_pruner", budget=10) as held:
        first = act(policy)
        with pytest.raises(SignalError, match="holds NaN"):
            act(policy, batch)
        assert history(held).pushed == 1
        assert torch.isfinite(first).all()
        assert torch.isfinite(act(policy)).all()


# --- an episode


def test_past_actions_steer_the_next_selection(policy: Any) -> None:
    with attach(policy, "vla_pruner", budget=8, refresh_every=None) as held:
        act(policy)
        first = held.plans[0].anchor
        act(policy, models.batch(seed=3))
        second = held.plans[0].anchor
        policy.reset()
        act(policy, models.batch(seed=3))
        fresh = held.plans[0].anchor
    assert first.tolist() != second.tolist()
    assert second.tolist() != fresh.tolist()


def test_reset_begins_a_new_episode(policy: Any) -> None:
    with attach(policy, "vla_pruner", budget=10) as held:
        act(policy)
        act(policy)
        assert history(held).pushed == 2
        policy.reset()
        assert history(held).pushed == 0
        act(policy)
        assert (history(held).pushed, history(held).epoch) == (1, 1)


def test_a_reset_in_mid_inference_keeps_episodes_apart(policy: Any) -> None:
    """As real-time chunking does: the main thread resets while the inference thread computes."""
    step = policy.model.denoise_step
    calls: list[int] = []

    def denoise_step(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == STEPS + 2:
            thread = Thread(target=policy.reset)
            thread.start()
            thread.join()
        velocity: Tensor = step(*args, **kwargs)
        return velocity

    with attach(policy, "vla_pruner", budget=10) as held, pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(policy.model), "denoise_step", denoise_step)
        act(policy)
        before = held._episode.memories[0]
        act(policy)
        assert history(held).pushed == 0
        assert before.state[STATE].pushed == 2
        act(policy)
        assert history(held).pushed == 1
        assert before.state[STATE].pushed == 2


def test_steps_age_in_seconds(policy: Any) -> None:
    with attach(policy, "vla_pruner", budget=10, dt_s=0.1) as held:
        act(policy)
        act(policy)
        assert [g.time_s for g in history(held).glances] == pytest.approx([0.0, 0.3])
    with attach(policy, "vla_pruner", budget=10) as held:
        for time_s in (5.0, 5.5):
            act(policy, models.batch() | {"timestamp": torch.tensor([time_s])})
        assert [g.time_s for g in history(held).glances] == [5.0, 5.5]
        act(policy, models.batch() | {"timestamp": torch.tensor([0.5])})
        assert [g.time_s for g in history(held).glances] == [0.5]


def test_the_sequences_of_a_batch_do_not_mix(policy: Any) -> None:
    pair, other = models.batch(rows=2), models.batch(rows=2, seed=7)
    with attach(policy, "vla_pruner", budget=10) as held:
        act(policy, pair)
        actions = act(policy, other)
        plans = held.plans
        assert [history(held, row).pushed for row in (0, 1)] == [2, 2]
    for row in (0, 1):
        with attach(policy, "vla_pruner", budget=10) as held:
            for batch in (pair, other):
                alone = policy.predict_action_chunk(
                    {key: value[row : row + 1] for key, value in batch.items()},
                    noise=models.noise(2)[row : row + 1],
                )
            assert held.plans[0].anchor.tolist() == plans[row].anchor.tolist()
        torch.testing.assert_close(alone[0], actions[row], atol=1e-5, rtol=0)


def test_the_policys_own_queue_stays(policy: Any) -> None:
    torch.manual_seed(3)
    with attach(policy, "vla_pruner", budget=10) as held:
        actions = [policy.select_action(dict(models.batch())) for _ in range(4)]
        assert history(held).pushed == 2
    assert all(a.shape == (1, models.ACTION) for a in actions)


def test_sampling_without_a_batch_runs_untouched(policy: Any) -> None:
    """Nothing is known of pictures that do not come through the policy, so none are pruned."""
    given: list[Any] = []
    sample = policy.model.sample_actions

    def sample_actions(*args: Any, **kwargs: Any) -> Tensor:
        given.append((args, kwargs))
        actions: Tensor = sample(*args, **kwargs)
        return actions

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(policy.model), "sample_actions", sample_actions)
        act(policy)
    ((args, kwargs),) = given
    expected = sample(*args, **kwargs)
    with attach(policy, "uniform", budget=4) as held:
        act(policy)
        assert torch.equal(policy.model.sample_actions(*args, **kwargs), expected)
        assert held.plans[0].k == 4


# --- real-time chunking


def test_guidance_looks_in_the_first_flow_step_only(policy: Any) -> None:
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    left = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(5))
    policy.config.rtc_config = RTCConfig(execution_horizon=3)
    policy.init_rtc_processor()
    guided = {"inference_delay": 1, "prev_chunk_left_over": left}
    try:
        with attach(policy, "vla_pruner", budget=10) as held:
            act(policy)
            act(policy, **guided)
            first, second = history(held).glances
            assert held._last is not None
            assert held._last.steps.looks == len(held._pruning.action_layers)
            assert held._last.steps.step == STEPS - 1
            assert not second.value.requires_grad
            assert not torch.equal(first.value, second.value)
        with attach(policy, "vla_pruner", retain=1.0):
            same = act(policy, **guided)
        assert torch.equal(same, act(policy, **guided))
    finally:
        policy.config.rtc_config = policy.model.rtc_processor = policy.rtc_processor = None


# --- attaching


def test_detaching_restores_everything(policy: Any) -> None:
    def state() -> list[Any]:
        hooks = ("_forward_pre_hooks", "_forward_hooks")
        return [
            (set(vars(module)), *(len(getattr(module, hook)) for hook in hooks))
            for module in (policy, *policy.modules())
        ]

    act(policy)
    before, expected = state(), act(policy)
    held = attach(policy, "vla_pruner", budget=10)
    with held:
        act(policy)
        assert state() != before
    assert state() == before
    with pytest.raises(ZeroDivisionError), held:
        raise ZeroDivisionError
    assert state() == before
    assert torch.equal(act(policy), expected)


def test_attaching_twice_is_an_error(policy: Any) -> None:
    with (
        attach(policy, budget=10),
        pytest.raises(AttachError, match="pruned already"),
        attach(policy, budget=10),
    ):
        pass


def test_training_is_an_error(policy: Any) -> None:
    policy.train()
    try:
        with pytest.raises(AttachError, match=r"call policy\.eval"), attach(policy, budget=10):
            pass
    finally:
        policy.eval()
    batch = models.batch() | {"action": torch.zeros(1, models.CHUNK, models.ACTION)}
    with attach(policy, budget=10), pytest.raises(AttachError, match="for inference"):
        policy.forward(batch)


def test_a_compiled_policy_is_an_error(policy: Any) -> None:
    policy.config.compile_model = True
    try:
        with pytest.raises(AttachError, match="compile_model=True"), attach(policy, budget=10):
            pass
    finally:
        policy.config.compile_model = False


def test_reducers_that_do_not_fit_are_named_with_those_that_do(policy: Any) -> None:
    with pytest.raises(AttachError, match="cannot give saliency") as caught:
        attach(policy, "holitom", budget=10)
    fitting = str(caught.value).split("fit: ")[1].rstrip(".").split(", ")
    stages = {name: build_reducer(name).stages for name in reducer_names()}
    assert fitting == [
        name
        for name, own in stages.items()
        if not any(Signal.SALIENCY in stage.needs or stage.reuses for stage in own)
    ]


def test_a_budget_is_given_once(policy: Any) -> None:
    with pytest.raises(BudgetError, match="exactly one"):
        attach(policy, "vla_pruner")
    with pytest.raises(BudgetError, match="exactly one"):
        attach(policy, "vla_pruner", budget=3, retain=0.5)


def test_other_policies_are_named_with_the_supported_ones() -> None:
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    shape = models.features()
    config = ACTConfig(
        input_features=shape["input_features"],
        output_features=shape["output_features"],
        pretrained_backbone_weights=None,
        device="cpu",
    )
    with pytest.raises(AttachError, match=r"type 'act'\. Supported: .*smolvla"):
        attach(ACTPolicy(config), budget=3)
