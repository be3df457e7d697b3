"""The demo: a small checkpoint with random weights, and the script that makes it."""
