"""The served product as clients meet it."""
