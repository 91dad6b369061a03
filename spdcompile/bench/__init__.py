"""Measures the compiler beside its peers: one launch, all variants in turn in every round."""
