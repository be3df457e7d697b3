"""The demo: a small trained checkpoint, and the scripts that train, evaluate and compare it."""
