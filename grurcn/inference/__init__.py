"""Trained models in use: prediction, export, serving."""
