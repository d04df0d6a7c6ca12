"""Scores of trained models, and files of them."""
