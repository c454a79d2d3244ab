"""Experiments on the engine: runners without a model, invariants, faults to switch on, comparisons of policies."""
