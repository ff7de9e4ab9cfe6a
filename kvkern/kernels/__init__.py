"""The kernels K0 to K3 in Triton, and the fp64 oracle that judges every backend.

`oracle` imports torch alone. Every other module here imports triton, so only the triton backend imports them, when it is
chosen: the package works where triton is not installed.
"""
