"""Launchers of the C++ CPU kernels: packing, checks, addresses."""
