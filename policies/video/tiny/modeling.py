"""The model: transformers' LLaVA-OneVision with a small SigLIP and a small Qwen2, and its
processor.

224 px frames, patches of 8 px (28 x 28), pooled by the stock model to 14 x 14 = 196 tokens a frame,
plus one newline token at the end of the video. The tokenizer knows the words of the questions and
answers; it ignores case and punctuation, and reads anything else as `<unk>`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from .questions import CHOICES, TEMPLATES
from .world import COLORS, FRAME_PX, SHAPES

PATCH_PX = 8
VOCAB_SIZE = 256
PAD, UNK, START, END = "<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>"
IMAGE, VIDEO = "<image>", "<video>"
SPECIAL = (PAD, UNK, START, END, IMAGE, VIDEO)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<video> {% elif part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECENT_HEADS = 3
RECENT_CHANNELS = slice(3, 11)  # wavelengths of about 23 to 470 tokens
RECENT_BIAS = 10**0.5
Model = LlavaOnevisionForConditionalGeneration
DEFAULT_CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny_video"


def vocabulary() -> dict[str, int]:
    """Special tokens, then every word of the questions and answers in alphabetical order."""
    texts = [re.sub(r"{\w+}", " ", text) for wordings in TEMPLATES.values() for text in wordings]
    words = {word for text in texts for word in re.findall("[a-z]+", text.lower())}
    words |= {name for names in CHOICES.values() for name in names} | set(COLORS) | set(SHAPES)
    words |= {"user", "assistant", "system", "last"}
    return {word: i for i, word in enumerate((*SPECIAL, *sorted(words)))}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace("colour", "color"),
            normalizers.Replace(Regex("[^a-z0-9]+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[START, IMAGE, VIDEO],
        model_max_length=32768,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor() -> LlavaOnevisionProcessor:
    size = {"height": FRAME_PX, "width": FRAME_PX}
    pixels = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return LlavaOnevisionProcessor(  # type: ignore[no-untyped-call]
        image_processor=LlavaOnevisionImageProcessor(
            image_grid_pinpoints=[[FRAME_PX, FRAME_PX]], **pixels
        ),
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        tokenizer=make_tokenizer(),
        num_image_tokens=(FRAME_PX // PATCH_PX) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        video_token=VIDEO,
    )


def make_config() -> LlavaOnevisionConfig:
    ids = vocabulary()
    vision: dict[str, Any] = {
        "image_size": FRAME_PX,
        "patch_size": PATCH_PX,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "vision_use_head": False,
    }
    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 320,
        "intermediate_size": 896,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }
    whole: dict[str, Any] = {
        "vision_config": SiglipVisionConfig(**vision),
        "text_config": Qwen2Config(**text),
        "image_token_index": ids[IMAGE],
        "video_token_index": ids[VIDEO],
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "image_grid_pinpoints": [[FRAME_PX, FRAME_PX]],
        "tie_word_embeddings": False,
    }
    return LlavaOnevisionConfig(**whole)


def make_model(seed: int) -> Model:
    """A freshly initialised model in float32."""
    torch.manual_seed(seed)
    model = Model(make_config())
    _initialise(model)
    ids = vocabulary()
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=ids[END], pad_token_id=ids[PAD], do_sample=False
    )
    return model


@torch.no_grad()
def _initialise(model: Model) -> None:
    """A start from which a question is read at all behind thousands of visual tokens.

    With the library's defaults all heads attend uniformly, so ten words among 1,600 tokens are
    lost. Here words and visual tokens start at a comparable size, and the biases of some heads make
    a bump in relative position: those heads begin by looking at the last few tokens, and learn on
    from there.
    """
    llm, projector = model.model.language_model, model.model.multi_modal_projector
    llm.embed_tokens.weight.normal_(std=0.5)
    model.lm_head.weight.copy_(0.1 * llm.embed_tokens.weight)
    for linear in (projector.linear_1, projector.linear_2):
        torch.nn.init.xavier_normal_(linear.weight)
    for layer in llm.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            mlp.gate_proj,
            mlp.up_proj,
        ):
            linear.weight.normal_(std=0.05)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.normal_(std=0.05 / (2 * len(llm.layers)) ** 0.5)
        for linear in (attention.q_proj, attention.k_proj):
            linear.bias.view(-1, attention.head_dim)[:RECENT_HEADS, RECENT_CHANNELS] = RECENT_BIAS


def save_checkpoint(model: Model, folder: Path) -> None:
    """A folder for `from_pretrained`: bfloat16 shards of at most 15 MB, processor and tokenizer."""
    bf16 = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=bf16, max_shard_size="15MB")
    make_processor().save_pretrained(folder)


def load_checkpoint(folder: Path | str = DEFAULT_CHECKPOINT) -> Model:
    """The trained model in float32, for evaluation."""
    model: Model = Model.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.train(False)
    return model
