"""Optimizers that are no rules: their steps are made of products of matrices, outside the engine."""
