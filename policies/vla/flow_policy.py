"""lerobot's flow policies in three phases, so that budgets can be decided in between.

What goes in and out is made by the policy's own processors; in between, noise becomes actions in a
number of flow steps that may differ from call to call.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stream.data import ActionChunk, Budget, Observation, PatchGrid
from stream.errors import AttachError, ConfigError, ValueShapeError
from stream.memory import Memory
from stream.reducers.base import Reducer
from stream.reducers.identity import Identity

from ..graphs.wanted import Capture, wanted
from .base import PolicySpec, Prefix, Scene, VLAPolicy
from .families import family_of
from .flow import FlowPruning, FlowSteps, Inference, Request
from .flow_captured import CapturedFlow
from .flow_family import FlowFamily, Seen

STEP_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class FlowScene(Scene):
    """embeds: [1, n, d] of the whole prefix; padding, blocks: its masks, bool [1, n]."""

    seen: Seen
    embeds: Tensor
    padding: Tensor
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class _Held:
    """A prefix as its policy needs it."""

    cache: Any
    inference: Inference
    padding: Tensor
    observation: Observation


class FlowPolicy(VLAPolicy):
    """A lerobot flow policy and the reducer it is pruned by.

    preprocess, postprocess: lerobot's own pipelines of this policy. dt_s: control period, which
    lerobot's checkpoints do not tell. capture: whether it runs in fixed shapes.

    For one thread at a time: a call that overlaps another is refused with AttachError where it
    would mix into it.

    SmolVLA and pi05 put the state into the prefix: acted from an old prefix, they go by its state;
    pi0 goes by the newer one.
    """

    def __init__(
        self,
        policy: Any,
        preprocess: Callable[[dict[str, Any]], dict[str, Any]],
        postprocess: Callable[[Tensor], Tensor],
        reducer: Reducer | None = None,
        *,
        name: str = "",
        dt_s: float = 1 / 30,
        capture: Capture = "auto",
    ) -> None:
        self._family: FlowFamily = family_of(policy)
        self._preprocess, self._postprocess = preprocess, postprocess
        self._pruning = FlowPruning(self._family, reducer or Identity(), look=True)
        self.device = next(policy.parameters()).device
        config, family = policy.config, self._family
        captures = wanted(capture, self.device)
        self.captured = CapturedFlow(family, self._pruning, self.device) if captures else None
        self._keys = {
            key.removeprefix("observation.").removeprefix("images."): key for key in family.cameras
        }
        state = config.input_features.get("observation.state")
        self._spec = PolicySpec(
            name=name or str(config.type),
            cameras=tuple(self._keys),
            grid=PatchGrid(len(self._keys), family.side, family.side),
            chunk=config.chunk_size,
            execute=config.n_action_steps,
            action_size=config.output_features["action"].shape[0],
            state_size=state.shape[0] if state else 0,
            dt_s=dt_s,
            steps=tuple(sorted({max(1, round(s * family.flow_steps)) for s in STEP_SHARES})),
        )

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    def pruned_by(self, reducer: Reducer) -> FlowPolicy:
        return FlowPolicy(
            self._family.policy,
            self._preprocess,
            self._postprocess,
            reducer,
            name=self._spec.name,
            dt_s=self._spec.dt_s,
            capture="off" if self.captured is None else "on",
        )

    @torch.inference_mode()
    def encode(self, observation: Observation) -> FlowScene:
        """See `VLAPolicy`. Raises ValueShapeError for a state or cameras of another robot, too."""
        family = self._family
        cameras = tuple(c for c in self._keys if observation.images.get(c) is not None)
        self._check(observation, cameras)
        batch = self._batch(observation, cameras)
        pictures, masks = getattr(family.policy, family.pictures)(batch)
        pictures, masks, seen = family.see(batch, pictures, masks)
        embed = (self._fixed_now() or family).embed
        embeds, padding, blocks = embed(pictures, masks, *family.words(batch))
        return FlowScene(
            x=embeds[0, seen.slots(embeds.device)],
            grid=replace(self._spec.grid, frames=len(cameras)),
            cameras=cameras,
            observation=observation,
            signals={},
            seen=seen,
            embeds=embeds,
            padding=padding,
            blocks=blocks,
        )

    @torch.inference_mode()
    def prefill(self, scene: Scene, budget: Budget, memory: Memory, epoch: int = 0) -> Prefix:
        """See `VLAPolicy`; the scene is one that this policy encoded."""
        assert isinstance(scene, FlowScene)
        observation = scene.observation
        request = Request(scene.seen, budget, (memory,), (observation.time_s,))
        fixed = self._fixed_now()
        prefill = fixed.prefill if fixed else self._prefill
        cache, inference = prefill(request, scene.embeds, scene.padding, scene.blocks)
        memory.tick += 1
        places = scene.seen.index(self.device)
        plan = inference.plans[0].among(places)
        return Prefix(
            plan=plan,
            grid=scene.grid,
            cameras=scene.cameras,
            places=places,
            tokens=plan.k,
            cache=_Held(cache, inference, scene.padding, observation),
            observed_s=observation.time_s,
            epoch=epoch,
        )

    @torch.inference_mode()
    def act(
        self, prefix: Prefix, observation: Observation, steps: int | None = None, seed: int = 0
    ) -> tuple[ActionChunk, Tensor]:
        if steps not in (None, *self._spec.steps):
            raise ConfigError(f"steps is {steps}; {self._spec.name} takes {self._spec.steps}.")
        held: _Held = prefix.cache
        known = held.observation if self._family.state_in_prefix else observation
        self._check(known, prefix.cameras)
        # Also tells the processors which state relative actions start from.
        batch = self._batch(known, ())
        inference = held.inference.anew()
        fixed = self._fixed_now()
        flow = fixed.flow if fixed else self._flow
        actions = flow(
            inference.steps,
            self._noise(seed),
            steps or self._family.flow_steps,
            held.padding,
            held.cache,
            *self._family.beside(batch),
        )
        actions = self._family.finished(actions[..., : self._spec.action_size])
        chunk = self._postprocess(actions)[0].float().cpu().numpy()
        attention = torch.zeros(prefix.grid.size, device=self.device)
        attention[prefix.plan.anchor] = inference.attention()[0]
        return ActionChunk(chunk, held.observation.time_s), attention

    def _fixed_now(self) -> CapturedFlow | None:
        return self.captured if self.captured and self.captured.ready() else None

    def _prefill(self, request: Request, *prefix: Tensor) -> tuple[Any, Inference]:
        """As `CapturedFlow.prefill`, kernel by kernel."""
        with self._pruning as pruning:
            pruning.expect(request)
            cache = self._family.prefill(*prefix)
            inference = pruning.inference
        assert inference is not None
        return cache, inference

    def _flow(self, steps: FlowSteps, noise: Tensor, count: int, *prefix: Any) -> Tensor:
        """As `CapturedFlow.flow`, kernel by kernel."""
        from lerobot.policies.common.flow_matching import euler_integrate

        with self._pruning as pruning:
            pruning.steps = steps
            actions: Tensor = euler_integrate(
                lambda noisy, time: self._family.velocity(noisy, time, *prefix), noise, count
            )
        return actions

    def _noise(self, seed: int) -> Tensor:
        shape = (1, self._spec.chunk, self._family.policy.config.max_action_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def _batch(self, observation: Observation, cameras: tuple[str, ...]) -> dict[str, Any]:
        """Model inputs by the policy's own preprocessing, with the pictures of some cameras."""
        batch: dict[str, Any] = {"task": observation.instruction}
        if self._spec.state_size:
            batch["observation.state"] = torch.from_numpy(observation.state)
        for camera in cameras:
            picture = torch.from_numpy(observation.images[camera])
            batch[self._keys[camera]] = picture.permute(2, 0, 1).float() / 255
        return self._preprocess(batch)

    def _check(self, observation: Observation, cameras: tuple[str, ...]) -> None:
        spec = self._spec
        if not cameras:
            raise ValueShapeError(
                f"No camera gave a picture; {spec.name} needs at least one of "
                f"{', '.join(spec.cameras)}, the observation has "
                f"{', '.join(observation.images) or 'none'}."
            )
        if spec.state_size and observation.state.shape != (spec.state_size,):
            raise ValueShapeError(
                f"Observation.state has {observation.state.size} numbers, {spec.name} was trained "
                f"on {spec.state_size}."
            )


def load(
    name: str,
    reducer: Reducer | None = None,
    device: str | None = None,
    capture: Capture = "auto",
) -> FlowPolicy:
    """A policy from a checkpoint folder or hub name of lerobot, by lerobot's own loaders.

    As in lerobot's own evaluation, products of float32 on a GPU may round their factors in the
    whole process from then on (`torch.backends.cuda.matmul.allow_tf32`). Reads safetensors and JSON
    alone. Raises AttachError for what cannot be loaded, also where lerobot itself would go on with
    random weights. capture: see `FlowPolicy`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from safetensors import SafetensorError

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config: Any = PreTrainedConfig.from_pretrained(name)
        config.device, config.compile_model = device, False
        with contextlib.redirect_stdout(sys.stderr):
            policy: Any = get_policy_class(config.type).from_pretrained(name, config=config)
        folder = Path(name)
        _check_weights(
            policy, folder / WEIGHTS if folder.is_dir() else hf_hub_download(name, WEIGHTS)
        )
        before, after = make_pre_post_processors(
            config,
            pretrained_path=name,
            preprocessor_overrides={"device_processor": {"device": device}},
        )
    except (OSError, ValueError, KeyError, HfHubHTTPError, SafetensorError) as error:
        raise AttachError(
            f"Policy '{name}' cannot be loaded: {str(error).splitlines()[0]} Give a folder or hub "
            "name that `save_pretrained` of a lerobot policy and its processors wrote."
        ) from error
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    return FlowPolicy(policy.to(device).eval(), before, after, reducer, name=name, capture=capture)


def _check_weights(policy: Any, path: str | Path) -> None:
    """lerobot's pi0 answers a failed load with a line of text and random weights."""
    from safetensors import safe_open

    own = policy.model.action_out_proj.weight
    with safe_open(path, framework="pt") as file:
        names = [k for k in list(file.keys()) if k.endswith("action_out_proj.weight")]
        stored = file.get_tensor(names[0]) if names else None
    if stored is None or stored.shape != own.shape or not torch.equal(stored.to(own), own):
        raise AttachError(f"The weights in {path} do not fit {type(policy).__name__}.")
