"""Distillation: losses between a student and its teacher, and the training that uses them."""
