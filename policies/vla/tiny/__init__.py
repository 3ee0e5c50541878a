"""The small trained robot policy in the box.

- `modeling`  its shapes, its word-level tokenizer, how it is saved
- `demos`     demonstrations on the device, and batches of them
- `train`     `python -m policies.vla.tiny.train`
"""
