"""Where pictures and records of a run go."""
