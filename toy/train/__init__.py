"""Trains the toy models, one module for each: ``python -m toy.train.vae ALBUM OUT STEPS``."""
