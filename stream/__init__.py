"""Frames in, fewer tokens out, on time. Knows no model and no simulator."""
