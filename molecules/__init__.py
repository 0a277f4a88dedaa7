"""Kernel regression on small molecules. In reading order:

  layers.py   layers for graphs, added to those of kernel.py
  smiles.py   files to checked molecules, graphs and fingerprints (RDKit)
  graphs.py   the kernels of graph networks, fast
  missing.py  many tasks with missing labels, one kernel
  train.py    the experiment: python -m molecules.train
  predict.py  a fitted model in a file, and its predictions for new molecules

No other folder needs this one, but for the speed of its kernels (results/speed.py) and for such inputs to own/estimator.py.
"""
