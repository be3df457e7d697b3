"""A running frontend and the scripted controller it talks to."""
