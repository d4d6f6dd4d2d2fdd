"""What a machine with a CUDA GPU should show, in calls of nine, four and nine minutes (`benchmarks/gpu_check.sh`)."""
