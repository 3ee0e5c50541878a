"""tiny-vla: two 128 px cameras, 512 visual tokens, a 6-layer decoder, a chunk of 8 actions.

15 M parameters. The tokenizer knows the words of the instructions it was trained on and reads
anything else as `<unk>`; case and punctuation carry nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..openvla_model import Head, OpenVLA, OpenVLAConfig

IMAGE_PX = 128
CHUNK = 8
PAD, UNK, BOS = SPECIAL = ("<pad>", "<unk>", "<s>")


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Special tokens, then the words of the texts in alphabetical order; BOS comes first."""
    words = sorted({word for text in texts for word in re.findall("[a-z0-9]+", text.lower())})
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z0-9]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        clean_up_tokenization_spaces=False,
    )


def make_config(
    cameras: Sequence[str],
    vocabulary: int,
    *,
    state_mean: Sequence[float],
    state_std: Sequence[float],
    action_size: int,
    dt_s: float,
    pointers: int = 0,
    head: Head = "parallel",
    vision_layers: int = 6,
    layers: int = 6,
) -> OpenVLAConfig:
    stem_channels = 64
    vision: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        "num_channels": stem_channels,
        "image_size": IMAGE_PX // 4,
        "patch_size": 2,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 4,
        "vision_use_head": False,
    }
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 384,
        "intermediate_size": 896,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 1024,
        "pad_token_id": None,
    }
    return OpenVLAConfig(
        vision_configs=[vision],
        stem_channels=stem_channels,
        image_px=IMAGE_PX,
        cameras=cameras,
        text_config=text,
        head=head,
        chunk=CHUNK,
        execute=CHUNK,
        action_size=action_size,
        state_size=len(state_mean),
        state_mean=state_mean,
        state_std=state_std,
        dt_s=dt_s,
        pointers=pointers,
        prompt="{instruction}",
    )


def make_model(config: OpenVLAConfig, seed: int) -> OpenVLA:
    """A freshly initialised model in float32.

    Words, states and queries start as large as visual tokens, and attention starts sharp enough
    for a few words to be read behind hundreds of visual tokens.
    """
    torch.manual_seed(seed)
    model = OpenVLA(config)
    llm: Any = model.language_model
    with torch.no_grad():
        for embedding in (llm.embed_tokens, model.queries):
            embedding.weight.normal_(std=0.5)
        model.camera_embedding.weight.normal_(std=0.1)
        for name, module in model.named_modules():
            outer = not name.startswith("language_model") and ".encoder." not in name
            if outer and isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
        deep = (2 * len(llm.layers)) ** -0.5
        for layer in llm.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                linear.weight.normal_(std=0.05)
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight.normal_(std=0.05)
            for linear in (attention.o_proj, mlp.down_proj):
                linear.weight.normal_(std=0.05 * deep)
    return model


def save_checkpoint(model: OpenVLA, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A folder for `policies.vla.openvla.load`: bfloat16 shards of at most 16 MB, and the words."""
    bf16 = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=bf16, max_shard_size="16MB")
    tokenizer.save_pretrained(folder)
