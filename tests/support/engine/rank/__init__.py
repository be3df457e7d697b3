"""Executors and ranks driven by hand-made plans, and the greedy tokens they must give."""
