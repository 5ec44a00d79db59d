"""From a trained model to lists of items that exist."""

from genrec.generation.recommender import Recommender, RecommenderConfig
from genrec.generation.trie import Trie

__all__ = ["Recommender", "RecommenderConfig", "Trie"]
