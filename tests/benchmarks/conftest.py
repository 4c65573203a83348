"""The stand-in for humming-kernels."""

from humming_stand_in import gpu, grouped_products

__all__ = ["gpu", "grouped_products"]
