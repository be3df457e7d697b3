"""The generator of the demo model's cases: one module per family. Everything is drawn from a seeded
``random.Random``.
"""
