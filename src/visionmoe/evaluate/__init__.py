"""Evaluation of models: classification, and accuracy against compute."""
