"""The `cpu` backend: our C++ kernels (`torch.ops.sgmim_fast_cpu`) between the library's gemms."""
