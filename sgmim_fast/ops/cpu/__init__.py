"""The `cpu` backend: our C++ kernels (`torch.ops.sgmim_fast_cpu`), and gemms of the library or our own."""
