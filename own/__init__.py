"""Your own data, and fitted models. In reading order:

  model.py        a fitted model in a file, and its predictions for new images (--save, --load, --predict)
  images.py       images of your own: arrays, or a folder with a folder of files for each class (--dataset PATH)
  uncertainty.py  how sure a prediction is: variance, probabilities, calibration (--variance)
  estimator.py    KernelRegressor and KernelClassifier for scikit-learn: fit, predict, grid search
  tables.py       CSV files, read and checked; proteins/ and molecules/ read theirs with it

Without this folder images are fitted and tested as before, but none of your own; no model is saved and no variance computed.
Proteins and molecules need this folder.
"""
