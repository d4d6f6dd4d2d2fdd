"""Pruning: what is zeroed, by which importance, on which schedule, and how much a layer or a whole model can lose."""
