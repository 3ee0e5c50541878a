"""An OpenVLA-shaped network, from a tiny one to 7B, of transformers' parts.

Vision encoders side by side on each camera's picture, their patch features joined and projected,
a Llama decoder, and action tokens: decoded one by one from bins (OpenVLA, arXiv 2406.09246) or all
at once as a chunk of real numbers (OpenVLA-OFT, arXiv 2502.19645). The sequence is

    BOS | visual tokens, camera after camera | text || proprioception | actions

and what stands before `||` does not depend on the robot's state, so it can be prefilled once and
acted from again with a newer state. States and actions are normalised here, see `OpenVLAConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import repeat
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache, LlamaConfig, LlamaModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..graphs.branches import at_once
from ..products import NarrowLinear
from ..vision.layout import lay_out_patches
from ..vision.tower import States, states

Head = Literal["parallel", "autoregressive"]


class OpenVLAConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Shapes and units of a policy.

    vision_configs: transformers vision configs as mappings, each with `model_type`, and with
        `image_mean` and `image_std` (three numbers for pixels in 0..1; 0.5 if absent).
    stem_channels: of a convolutional stem of stride 4 before each encoder; 0 = none. An encoder
        behind a stem is configured for that many channels and pictures of a quarter the size.
    image_px: height and width of the pictures; others are resized. cameras: in token order.
    action_low, action_high: what -1 and 1 of a normalised action stand for, in the environment's
        units. state_mean, state_std: of the proprioception; state_size 0 = no such token.
    chunk: actions of one inference; execute: how many of them are meant to be executed.
    pointers: things that the words of the instruction can point at in the pictures; 0 = none.
    prompt: what the decoder reads, with `{instruction}` in it.
    """

    model_type = "foveate_openvla"

    def __init__(
        self,
        vision_configs: Sequence[dict[str, Any]] = (),
        stem_channels: int = 0,
        image_px: int = 224,
        cameras: Sequence[str] = ("front",),
        text_config: dict[str, Any] | None = None,
        head: Head = "autoregressive",
        chunk: int = 1,
        execute: int = 1,
        action_size: int = 7,
        action_low: Sequence[float] | None = None,
        action_high: Sequence[float] | None = None,
        bins: int = 256,
        state_size: int = 0,
        state_mean: Sequence[float] | None = None,
        state_std: Sequence[float] | None = None,
        dt_s: float = 0.2,
        pointers: int = 0,
        prompt: str = "In: What action should the robot take to {instruction}?\nOut:",
        **kwargs: Any,
    ) -> None:
        self.vision_configs = [dict(c) for c in vision_configs]
        self.stem_channels = stem_channels
        self.image_px = image_px
        self.cameras = list(cameras)
        self.text_config = dict(text_config or {})
        self.head = head
        self.chunk = chunk
        self.execute = execute
        self.action_size = action_size
        self.action_low = list(action_low or [-1.0] * action_size)
        self.action_high = list(action_high or [1.0] * action_size)
        self.bins = bins
        self.state_size = state_size
        self.state_mean = list(state_mean or [0.0] * state_size)
        self.state_std = list(state_std or [1.0] * state_size)
        self.dt_s = dt_s
        self.pointers = pointers
        self.prompt = prompt
        super().__init__(**kwargs)


class VisionTower(nn.Module):
    """Pictures [m, height, width, 3] in 0..255 -> patch features [m, patches, width]."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: dict[str, Any], stem_channels: int) -> None:
        super().__init__()
        config = dict(config)
        mean, std = config.pop("image_mean", [0.5] * 3), config.pop("image_std", [0.5] * 3)
        self.register_buffer("pixel_mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", 255 * torch.tensor(std).view(1, 3, 1, 1))
        self.stem = stem(stem_channels) if stem_channels else nn.Identity()
        made: Any = AutoConfig.for_model(config.pop("model_type"), **config)
        make: Any = AutoModel.from_config
        encoder = make(made, attn_implementation="sdpa")
        self.encoder = getattr(encoder, "vision_model", encoder)  # a wrapper in some versions
        lay_out_patches(self.encoder)
        self.width: int = made.hidden_size
        self.side: int = made.image_size // made.patch_size

    def forward(self, images: Tensor, encoder: States | None = None) -> Tensor:
        """encoder: what runs in place of its own."""
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        seen = self.stem(pixels.to(next(self.parameters()).dtype))
        states: Tensor = encoder(seen) if encoder else self.encoder(seen).last_hidden_state
        return states[:, states.shape[1] - self.side**2 :]  # class and register tokens come first


def stem(channels: int) -> nn.Sequential:
    """Early convolutions of stride 4 in all."""
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(3, half, 3, stride=2, padding=1),
        nn.GroupNorm(4, half),
        nn.GELU(),
        nn.Conv2d(half, channels, 3, stride=2, padding=1),
        nn.GroupNorm(8, channels),
        nn.GELU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


class OpenVLA(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The network. `policies.vla.openvla.OpenVLAPolicy` makes a policy of it.

    side: rows, and columns, of one camera's patch grid.
    """

    config_class = OpenVLAConfig
    base_model_prefix = "model"
    main_input_name = "images"
    _supports_sdpa = True

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        text = LlamaConfig(**config.text_config)
        text._attn_implementation = "sdpa"
        width = text.hidden_size
        towers = [VisionTower(c, config.stem_channels) for c in config.vision_configs]
        seen = sum(tower.width for tower in towers)
        self.side = towers[0].side
        self.towers = nn.ModuleList(towers)
        self.projector = nn.Sequential(
            nn.Linear(seen, 4 * seen),
            nn.GELU(),
            nn.Linear(4 * seen, width),
            nn.GELU(),
            nn.Linear(width, width),
        )
        self.camera_embedding = nn.Embedding(len(config.cameras), width)
        self.language_model = LlamaModel(text)
        self.proprioception = _mlp(config.state_size, width, width) if config.state_size else None
        self.queries = nn.Embedding(config.chunk if self.is_parallel else 1, width)
        self.action_head: nn.Module = _mlp(width, width, config.action_size)
        if not self.is_parallel:
            self.action_embedding = nn.Embedding(config.bins, width)
            self.action_head = nn.Linear(width, config.bins)
        self.pointer = nn.Linear(width, config.pointers * width) if config.pointers else None
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def is_parallel(self) -> bool:
        return bool(self.config.head == "parallel")

    @property
    def visual_tokens(self) -> int:
        """Of all cameras together."""
        return len(self.config.cameras) * self.side**2

    @property
    def state_rows(self) -> int:
        return int(self.proprioception is not None)

    def see(
        self, images: Tensor, camera: Tensor, encoders: Sequence[States] | None = None
    ) -> Tensor:
        """Pictures [m, height, width, 3] in 0..255 of cameras long [m] -> tokens [m, p, d].

        encoders: what runs in place of those of the towers.
        """
        px = self.config.image_px
        if images.shape[1:3] != (px, px):
            planes = images.permute(0, 3, 1, 2).float()
            planes = F.interpolate(planes, (px, px), mode="bilinear", antialias=True)
            images = planes.permute(0, 2, 3, 1)
        given = encoders or repeat(None)
        works = [
            partial(tower, images, encoder)
            for tower, encoder in zip(self.towers, given, strict=False)
        ]
        features = torch.cat(at_once(images.device, works), dim=-1)
        tokens: Tensor = self.projector(features) + self.camera_embedding(camera)[:, None]
        return tokens

    def lean_encoders(self) -> list[States]:
        """The encoders in fewer kernels, for `see`, from the weights that lie there now."""
        towers: Any = self.towers
        return [states(tower.encoder) for tower in towers]

    def words(self, ids: Tensor) -> Tensor:
        """Text ids long [b, t] -> [b, t, d]."""
        rows: Tensor = self.language_model.embed_tokens(ids)
        return rows

    def point(self, visual: Tensor, words: Tensor, weight: Tensor) -> Tensor:
        """How well each visual token fits what the words name: logits float32 [b, n, pointers].

        visual: [b, n, d]; words: [b, t, d] with their weight float [b, t], 0 for padding. Without
        trained pointers, the cosine to the mean word.
        """
        mean = (words * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        if self.pointer is None:
            return F.cosine_similarity(visual, mean[:, None], dim=-1).float()[..., None]
        named: Tensor = self.pointer(mean.to(visual.dtype)).unflatten(
            -1, (self.config.pointers, -1)
        )
        logits: Tensor = (visual @ named.mT).float() * visual.shape[-1] ** -0.5
        return logits

    def look(
        self,
        images: Tensor,
        camera: Tensor,
        ids: Tensor,
        length: Tensor,
        encoders: Sequence[States] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`see`, and float32 [m, p]: where the words point in each picture, of sum 1.

        ids: words of each picture, long [m, t], padded on the right; length: long [m], how many.
        """
        tokens, words = self.see(images, camera, encoders), self.words(ids)
        said = torch.arange(words.shape[1], device=ids.device) < length[:, None]
        return tokens, self.point(tokens, words, said.to(words.dtype)).softmax(1).mean(-1)

    def state_row(self, state: Tensor) -> Tensor:
        """Normalised proprioception [b, s] -> [b, 1, d], or [b, 0, d] without such a token."""
        if self.proprioception is None:
            return self.query_rows(state.shape[0])[:, :0]
        row: Tensor = self.proprioception(state.to(self.dtype))
        return row[:, None]

    def query_rows(self, batch: int) -> Tensor:
        """Where actions are read: [b, chunk, d] (parallel) or the first place [b, 1, d]."""
        queries: Tensor = self.queries.weight
        return queries.expand(batch, -1, -1)

    def bin_rows(self, bins: Tensor) -> Tensor:
        """Actions that are decoded already, long [b, t] -> [b, t, d]."""
        rows: Tensor = self.action_embedding(bins)
        return rows

    def to_bins(self, actions: Tensor) -> Tensor:
        """Normalised actions [...] -> long [...], the bin each falls in."""
        bins: int = self.config.bins
        return ((actions.clamp(-1, 1) + 1) / 2 * bins).long().clamp(max=bins - 1)

    def from_bins(self, bins: Tensor) -> Tensor:
        """The middle of each bin, normalised float32."""
        count: int = self.config.bins
        return (bins.float() + 0.5) / count * 2 - 1

    def decode(self, rows: Tensor, cache: DynamicCache, position: Tensor, mask: Any) -> Tensor:
        """Run rows [b, n, d] through the decoder behind what the cache holds -> [b, n, d].

        position: long [b, n]; mask: None, or what transformers takes: 2-D over all that was seen.
        """
        out = self.language_model(
            inputs_embeds=rows,
            past_key_values=cache,
            position_ids=position,
            attention_mask=mask,
            use_cache=True,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def forward(
        self,
        visual: Tensor,
        text_ids: Tensor,
        text_length: Tensor,
        state: Tensor,
        actions: Tensor | None = None,
    ) -> Tensor:
        """All at once, as in training: what the decoder makes of the action rows, [b, rows, d].

        visual: [b, n, d] of all cameras; text_ids: long [b, t], BOS first, padded on the right;
        text_length: long [b], without BOS; state: [b, s] and actions [b, chunk, a], normalised.
        The rows are those of `query_rows`, or one for each bin of the actions, which only the
        autoregressive head reads.
        """
        b, device = visual.shape[0], visual.device
        words = self.words(text_ids)
        prefix = torch.cat([words[:, :1], visual.to(words.dtype), words[:, 1:]], dim=1)
        cache = DynamicCache()
        before = torch.arange(prefix.shape[1], device=device).expand(b, -1)
        self.decode(prefix, cache, before, None)
        rows = [self.state_row(state), self.query_rows(b)]
        if actions is not None and not self.is_parallel:
            rows.append(self.bin_rows(self.to_bins(actions).flatten(1)[:, :-1]))
        suffix = torch.cat([r.to(prefix.dtype) for r in rows], dim=1)
        s = suffix.shape[1]
        first = (1 + visual.shape[1] + text_length)[:, None]
        shown = before < first
        causal = torch.ones(s, s, dtype=torch.bool, device=device).tril()
        mask = torch.cat([shown[:, None].expand(-1, s, -1), causal.expand(b, -1, -1)], dim=-1)
        position = first + torch.arange(s, device=device)
        return self.decode(suffix, cache, position, mask[:, None])[:, self.state_rows :]


def _mlp(narrow: int, inner: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(narrow, inner), nn.GELU(), NarrowLinear(inner, out))


def openvla_7b(**changes: Any) -> OpenVLAConfig:
    """The shapes of OpenVLA 7B: DINOv2-L and SigLIP-so400m at 224 px, Llama 2 7B."""
    dinov2 = {
        "model_type": "dinov2_with_registers",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    siglip = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = {"vocab_size": 32064, "max_position_embeddings": 2048}
    settings: dict[str, Any] = {"vision_configs": [dinov2, siglip], "text_config": text}
    return OpenVLAConfig(**(settings | changes))
