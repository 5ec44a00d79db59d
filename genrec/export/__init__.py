"""Trained models, carried to other runtimes."""
