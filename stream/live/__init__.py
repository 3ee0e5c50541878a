"""What a stream that never ends needs: a gate, segments as they close, a token bucket, a bounded
window with an archive behind it, and the state machine that ties them. Knows no model."""
