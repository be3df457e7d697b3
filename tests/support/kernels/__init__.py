"""Inputs for kernels, poisoned memory, compilation for absent cards."""
