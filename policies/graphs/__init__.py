"""Fixed shapes: programs that a GPU replays as captured graphs and a CPU runs as they stand."""
