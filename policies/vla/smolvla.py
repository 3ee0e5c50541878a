"""lerobot's SmolVLA.

Its layers are taken apart by `SmolVLMWithExpertModel.forward`, never called, so module hooks never
fire; the two methods that run a layer's attention are wrapped on the instance instead. The prompt's
last row is the state's, which stands behind the instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stream.errors import AttachError

from ..probes import Attention
from .flow import FlowPruning, bound, instead, with_globals
from .flow_family import FlowFamily
from .lean import attend, attention, compiled_or_plain, is_of

LEROBOT = "lerobot.policies.smolvla.smolvlm_with_expert"


class Family(FlowFamily):
    pictures: ClassVar[str] = "prepare_images"
    state_in_prefix: ClassVar[bool] = True

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        if not policy.config.use_cache:
            raise AttachError("SmolVLA was configured with use_cache=False; pruning needs it True.")
        self.towers: Any = self.model.vlm_with_expert
        self._vlm: Any = self.towers.get_vlm_model()
        self._marks = {
            name: getattr(self.model, name).to(self._vlm.device)
            for name in ("global_image_start_token", "image_end_token")
        }
        self._places: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        self._timescales: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def depth(self) -> int:
        return int(self.towers.num_vlm_layers)

    @property
    def side(self) -> int:
        config = self.towers.config
        resized = self.policy.config.resize_imgs_with_padding
        pixels = resized[0] if resized else config.vision_config.image_size
        return int(pixels // config.vision_config.patch_size // config.scale_factor)

    @property
    def flow_steps(self) -> int:
        return int(self.policy.config.num_steps)

    @property
    def framing(self) -> tuple[int, int]:
        return (2, 1) if self.model.add_image_special_tokens else (0, 0)

    def is_masked(self, batch: dict[str, Any], key: str) -> bool:
        mask = batch.get(f"{key}_padding_mask")
        if mask is None:
            return False
        rows = mask.bool().tolist()
        if any(rows) != all(rows):
            raise AttachError(
                f"Camera '{key}' is missing in some sequences of the batch and given in others; "
                "run them one by one."
            )
        return not any(rows)

    def attention(self, layer: int, hidden: Tensor, positions: Tensor, mask: Tensor) -> Attention:
        from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope

        block = self._vlm.text_model.layers[layer]
        own = block.self_attn
        x = block.input_layernorm(hidden).to(own.q_proj.weight.dtype)
        query, key = (
            apply_rope(project(x).unflatten(-1, (-1, own.head_dim)), positions).transpose(1, 2)
            for project in (own.q_proj, own.k_proj)
        )
        return Attention(query, key, own.head_dim**-0.5, mask[:, None], causal=False)

    @contextmanager
    def intercept(self, pruning: FlowPruning) -> Iterator[None]:
        running: list[int] = []

        def layered(run: Any) -> Any:
            def attention_layer(
                model_layers: Any,
                inputs_embeds: list[Tensor | None],
                layer_idx: int,
                position_ids: Tensor,
                attention_mask: Tensor,
                *args: Any,
                **kwargs: Any,
            ) -> Any:
                prefix, suffix = inputs_embeds
                if suffix is None:
                    assert prefix is not None
                    # The caller goes on with this very list.
                    inputs_embeds[0], position_ids, attention_mask = pruning.enter(
                        layer_idx, prefix, position_ids, attention_mask
                    )
                else:
                    running.append(layer_idx)
                    attention_mask = pruning.enter_step(layer_idx, attention_mask)
                output = run(
                    model_layers,
                    inputs_embeds,
                    layer_idx,
                    position_ids,
                    attention_mask,
                    *args,
                    **kwargs,
                )
                if suffix is not None:
                    running.pop()
                    alive = pruning.alive(layer_idx)
                    if alive is not None:
                        # The policy's own crop is to the whole prefix, longer than this layer.
                        kwargs["past_key_values"].layers[layer_idx].crop(alive.shape[1])
                return output

            return attention_layer

        def seen(attend: Any) -> Any:
            def attention(
                mask: Tensor, batch: int, head_dim: int, query: Tensor, key: Tensor, value: Tensor
            ) -> Tensor:
                if running and pruning.looks(running[-1]):
                    with torch.no_grad():
                        pruning.look(running[-1], _received(mask, query, key))
                output: Tensor = attend(mask, batch, head_dim, query, key, value)
                return output

            return attention

        with ExitStack() as stack:
            for name in ("forward_attn_layer", "forward_cross_attn_layer"):
                stack.enter_context(bound(self.towers, name, layered))
            stack.enter_context(bound(self.towers, "eager_attention_forward", seen))
            yield

    def words(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS

        state = self.policy.prepare_state(self.policy._prepare_batch(batch))
        return batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK], state

    def embed(
        self, pictures: Sequence[Tensor], masks: Sequence[Tensor], *words: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, mask, state = words
        embeds, padding, blocks = self.model.embed_prefix(
            pictures, masks, tokens, mask, state=state
        )
        return embeds, padding, blocks

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """The tower selects its position embeddings by a mask of patches, of which here all count,
        and the marks around pictures come from the host each time."""
        tower = self._vlm.vision_model

        def seen(run: Any) -> Any:
            def forward(pixel_values: Tensor, patch_attention_mask: None = None) -> Any:
                patches = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
                places = self._patch_places(pixel_values)
                x = patches + tower.embeddings.position_embedding(places)
                encoded = tower.encoder(inputs_embeds=x, attention_mask=None)
                encoded.last_hidden_state = tower.post_layernorm(encoded.last_hidden_state)
                return encoded

            return forward

        with ExitStack() as stack:
            stack.enter_context(bound(tower, "forward", seen))
            for name, mark in self._marks.items():
                stack.enter_context(bound(self.model, name, partial(instead, mark)))
            for name, wrap in self._leaner():
                stack.enter_context(bound(self.towers, name, wrap))
            yield

    def _leaner(self) -> Iterator[tuple[str, Callable[[Any], Any]]]:
        """Methods of the towers, and by what they take fewer kernels, where they are lerobot's."""
        attending = self.towers.eager_attention_forward
        if is_of(LEROBOT, attending):
            yield "eager_attention_forward", partial(instead, _attended)
        for name in ("forward_attn_layer", "forward_cross_attn_layer"):
            method = getattr(self.towers, name)
            if is_of(LEROBOT, method) and is_of(LEROBOT, method.__globals__.get("apply_rope")):
                yield name, partial(with_globals, apply_rope=self._turned)

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """As the policy's `apply_rope`."""
        half, device = x.shape[-1] // 2, x.device
        if (half, device) not in self._timescales:
            exponents = torch.arange(half, dtype=torch.float32, device=device) / half
            self._timescales[half, device] = 10_000**exponents
        timescale = self._timescales[half, device]
        turned: Tensor = compiled_or_plain(x).rope(x, positions, timescale)
        return turned

    def _patch_places(self, pixels: Tensor) -> Tensor:
        """long [b, patches]: where the tower's own embeddings look up positions."""
        key = pixels.shape, pixels.dtype
        if key not in self._places:
            embeddings = self._vlm.vision_model.embeddings
            size = embeddings.patch_size

            def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                self._places[key] = args[0]

            rows, columns = (side // size for side in pixels.shape[2:])
            every = torch.ones(len(pixels), rows, columns, dtype=torch.bool, device=pixels.device)
            hook = embeddings.position_embedding.register_forward_pre_hook(note)
            try:
                embeddings(pixel_values=pixels, patch_attention_mask=every)
            finally:
                hook.remove()
        return self._places[key]

    def entering(
        self, embeds: Tensor, padding: Tensor, blocks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from lerobot.policies.common.vla_utils import make_att_2d_masks

        return embeds, padding.cumsum(1) - 1, make_att_2d_masks(padding, blocks)

    def layers(
        self, which: range, hidden: Tensor, positions: Tensor, mask: Tensor, cache: Any
    ) -> Iterator[Tensor]:
        towers, text = self.towers, self._vlm.text_model
        towers_layers = towers.get_model_layers([text, towers.lm_expert])
        shape = len(hidden), towers.config.text_config.head_dim
        for layer in which:
            block = text.layers[layer]
            out = block.self_attn.o_proj
            (seen,), _ = towers.forward_attn_layer(
                towers_layers, [hidden, None], layer, positions, mask, *shape, True, cache
            )
            # Sums are of the type of the layer, which the embeddings need not be of.
            moved = out(seen.to(out.weight.dtype))
            moved += hidden
            hidden = block.mlp(block.post_attention_layernorm(moved))
            hidden += moved
            yield hidden

    def prefill(self, embeds: Tensor, padding: Tensor, blocks: Tensor) -> Any:
        hidden, positions, mask = self.entering(embeds, padding, blocks)
        _, cache = self.towers.forward(
            attention_mask=mask,
            position_ids=positions,
            past_key_values=None,
            inputs_embeds=[hidden, None],
            use_cache=True,
        )
        return cache

    def velocity(
        self, noisy: Tensor, time: Tensor, padding: Tensor, cache: Any, *beside: Tensor
    ) -> Tensor:
        v: Tensor = self.model.denoise_step(padding, cache, noisy, time)
        return v

    def finished(self, actions: Tensor) -> Tensor:
        if self.policy.config.adapt_to_pi_aloha:
            encoded: Tensor = self.policy._pi_aloha_encode_actions(actions)
            return encoded
        return actions


def _attended(
    mask: Tensor, batch: int, head_dim: int, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """As the policy's `eager_attention_forward`; which attends in float32, too."""
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    seen, _ = attend(query.float(), key.float(), value, mask[:, None], head_dim**-0.5)
    return seen


def _received(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Mean over heads and rows, float32 [b, m]. query: [b, s, h, d]; key: [b, m, h_kv, d]; mask:
    bool [b, s, m], where each row sees something."""
    key = key.transpose(1, 2).float()
    return attention(query.float(), key, mask[:, None], query.shape[-1] ** -0.5).mean((1, 2))
