"""Measures a running server under offered load, and compares it with another one."""
