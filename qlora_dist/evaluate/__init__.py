"""Evaluation of trained models. Needs torch."""
