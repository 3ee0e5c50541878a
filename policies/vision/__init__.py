"""Vision encoders that compute less: patches merged inside, or not computed again."""
