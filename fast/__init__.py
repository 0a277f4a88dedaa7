"""The same kernels as kernel.py, about a hundred times faster. Read this room last.

  fused.py   K[p, q] cut into sheets: read its docstring with the README's picture of the sheets at hand
  cpu.cpp    all convs, relus and pools of fused.py in one pass of a CPU: 1.3 to 2.4 times as fast as XLA's loops
  cpu.py     builds the C++ on first use, if there is a compiler, and calls cpu.cpp
  fc.cpp     K v of a fully connected network: a tile is computed and multiplied while it is in the cache
  fc.py      calls fc.cpp, for a kernel matrix that is kept nowhere (large/on_the_fly.py)
  gpu.py     one conv and one relu of fused.py in a single pass on a GPU, in Pallas

cpu.py with what it builds, gpu.py, or the whole folder may be deleted: fused.py, or without it kernel.py, computes the same,
slowly.
"""
