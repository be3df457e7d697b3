"""Small checkpoints of every family and the models that read them."""
