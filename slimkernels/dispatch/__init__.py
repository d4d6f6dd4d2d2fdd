"""Which kernel runs a problem: tuned tables, cost models, break-even curves, and the choice between candidates."""
