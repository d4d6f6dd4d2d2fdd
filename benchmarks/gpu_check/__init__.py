"""What a machine with a CUDA GPU should show, in two calls of nine and four minutes (``benchmarks/gpu_check.sh``)."""
