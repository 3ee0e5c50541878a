"""Robot policies: what they see is pruned inside a deadline."""
