"""Processes that meet over gloo."""
