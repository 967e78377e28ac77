"""Triton kernels, one file per op; installed as `sgmim_fast.kernels`. Importing this package does not import Triton."""
