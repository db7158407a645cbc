"""Triton kernels, each with a naive reference and a registered op; installed as `vte_compile.kernels`."""
