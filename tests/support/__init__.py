"""What several test folders share. Imported as ``support`` (pytest's pythonpath holds
``tests``).
"""
