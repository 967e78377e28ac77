"""Triton kernels, one file per op; installs as `sgmim_fast.kernels`. Importing this package does not import Triton."""
