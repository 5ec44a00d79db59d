"""genrec: fused operators for generative recommenders, and the recommender built on them."""

__version__ = "0.1.0"
