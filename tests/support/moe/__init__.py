"""MoE layers and dispatchers to compare."""
