"""The generator of the demo model's cases: a module a family, all of it drawn from a seeded
``random.Random``.
"""
