"""Members: architectures, splits, training, weights, and the probes that are read in them."""
