"""The `cuda` backend: CUDA C++ kernels (`torch.ops.sgmim_fast_cuda`)."""
