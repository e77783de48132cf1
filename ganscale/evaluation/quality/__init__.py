"""Figures of sample quality as functions of features: distances, coverage, class scores."""
