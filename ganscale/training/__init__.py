"""Two networks trained against each other: steps, state, checkpoints and the loop."""
