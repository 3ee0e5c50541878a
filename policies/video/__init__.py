"""Video LLM adapters: one file for each model family, named after transformers' model type."""
