"""UGT, the generative recommender."""

from genrec.models.ugt.batch import PaddedTokens, TargetBatch, TokenBatch, map_tensors
from genrec.models.ugt.config import ModelVocabulary, UGTConfig
from genrec.models.ugt.decoder import Memory
from genrec.models.ugt.model import UGT

__all__ = ["UGT", "Memory", "ModelVocabulary", "PaddedTokens", "TargetBatch", "TokenBatch", "UGTConfig", "map_tensors"]
