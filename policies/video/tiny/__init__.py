"""The small trained video question answering model in the box, and the world it was trained on.

One file about one thing:

- `world`      seeded scene scripts: what is where, from when to when, in seconds
- `textures`   the static surfaces behind the things
- `render`     scene scripts to pixels, batched, on CPU or GPU
- `codec`      what h264 4:2:0 does to a frame, near enough for training
- `questions`  questions with single-word answers, read off a script
- `modeling`   the LLaVA-OneVision model, its word-level tokenizer and its processor
- `packed`     many questions behind one visual prefix, numerically the stock forward
- `batches`    endless training batches
- `train`      `python -m policies.video.tiny.train`
- `evaluate`   accuracy, whole and with tokens dropped
- `dataset`    held-out clips as real mp4 files with a manifest

The prompt is `<|im_start|>user <video> QUESTION <|im_end|><|im_start|>assistant`; white space, case
and punctuation carry no tokens. The answer is one word followed by `<|im_end|>`.
"""
