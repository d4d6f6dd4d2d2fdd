"""Triton kernels, a file an op and direction; importing this package imports no Triton, importing its modules does."""
