"""Plain PyTorch implementation of every operator, one file each: the oracle of the tests, and the kernels where nothing is compiled."""
