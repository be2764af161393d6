"""The Triton kernels, installed as `imbalance_kernels.triton_kernels`.

Never at top level: there `triton_kernels` is the import name of a package of Triton's own.
"""
