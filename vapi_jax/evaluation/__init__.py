"""Measures of generated images: feature extractors and the distance between sets of features."""
