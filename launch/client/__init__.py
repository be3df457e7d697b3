"""Clients of a running server: compares its answers with stored ones, measures it under traffic."""
