"""Low-rank factorization: decompositions of a weight, ranks per layer, and models whose layers became factors."""
