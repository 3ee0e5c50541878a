"""Simulator episodes: environments, demonstrations, and the clock that does not wait."""
