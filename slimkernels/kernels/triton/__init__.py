"""Triton kernels, a file an op and direction; importing the package, a config or an index imports no Triton."""
