"""Time of whole requests, stage by stage, with and without pruning and captured graphs."""
