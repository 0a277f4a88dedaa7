"""Kernel regression on protein sequences. In reading order:

  layers.py      layers for sequences, added to those of kernel.py
  sequences.py   files to checked sequences; encodings of residues, functions of the target
  train.py       the experiment: python -m proteins.train
  predict.py     a fitted model in a file, and its predictions for new sequences (--save, --load, --predict)

No other folder needs this one, but for the speed of its kernels (results/speed.py) and for such inputs to own/estimator.py.
"""
