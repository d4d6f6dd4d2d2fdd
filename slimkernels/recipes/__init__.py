"""Recipes: whole experiments as readable YAML, run step by step, resumable, with a report of what was measured.

`runner.reproduce` runs one; ``slimnets.yaml`` beside this file is the reproduction of SlimNets (arXiv 1808.00496).
"""
