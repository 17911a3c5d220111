"""Trains the embedded model on pictures of demo.animals."""
