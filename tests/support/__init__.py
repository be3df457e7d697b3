"""Code that several test folders share, in rooms like the package's own. Imported as ``support``:
pytest's pythonpath holds ``tests``.
"""
