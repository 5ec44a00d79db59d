"""The shape of a UGT and the vocabulary it speaks."""

from __future__ import annotations

from dataclasses import dataclass

from genrec.interfaces import TokenType


@dataclass(frozen=True)
class UGTConfig:
    """Size and regularisation of a UGT."""

    d_model: int = 64
    """width of every token"""
    heads: int = 2
    """attention heads; d_model is a multiple of it"""
    encoder_layers: int = 2
    """causal layers over the history"""
    decoder_layers: int = 1
    """mixture-of-experts layers over the codes of one item"""
    d_ffn: int = 128
    """hidden width of the encoder's feed-forward layers"""
    experts: int = 4
    """experts of every decoder layer"""
    top_k: int = 2
    """experts that each decoder row is sent to"""
    d_expert: int = 64
    """hidden width of one expert"""
    max_events: int = 50
    """how many of a user's last events the model reads"""
    rel_bias_size: int = 128
    """relative distances with a bias of their own; farther ones share the last"""
    token_types: tuple[str, ...] = ("item",)
    """which tokens of an event the encoder reads: item, action, time, context; item comes first"""
    dropout: float = 0.1
    """share of activations dropped in training"""
    token_dropout: float = 0.0
    """share of history tokens that are read as unknown in training, so that no single event is relied on"""
    transitions: int = 0
    """items that the item head remembers of each item as having come soon after it in the training log; 0: none"""

    def __post_init__(self) -> None:
        for name in (
            "d_model",
            "heads",
            "encoder_layers",
            "decoder_layers",
            "d_ffn",
            "d_expert",
            "max_events",
            "rel_bias_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; expected 1 or more")
        if self.d_model % self.heads:
            raise ValueError(f"model.d_model is {self.d_model}; expected a multiple of model.heads ({self.heads})")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"model.top_k is {self.top_k}; expected 1 to model.experts ({self.experts})")
        if self.transitions < 0:
            raise ValueError(f"model.transitions is {self.transitions}; expected 0 or more")
        known = [token_type.name.lower() for token_type in TokenType]
        if unknown := [name for name in self.token_types if name not in known]:
            raise ValueError(f"model.token_types has {unknown[0]!r}; expected names among {', '.join(known)}")
        if "item" not in self.token_types or len(set(self.token_types)) < len(self.token_types):
            raise ValueError(f"model.token_types is {list(self.token_types)}; expected 'item' and others, each once")
        for name in ("dropout", "token_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; expected at least 0 and below 1")

    @property
    def types(self) -> tuple[TokenType, ...]:
        """token_types as TokenType, in their numeric order."""
        return tuple(sorted(TokenType[name.upper()] for name in self.token_types))


@dataclass(frozen=True)
class ModelVocabulary:
    """Everything about the data that shapes the weights."""

    items: int  # N, without the out-of-vocabulary item
    codebook_sizes: tuple[int, ...]  # codes per level
    type_sizes: tuple[int, ...]  # ids of every TokenType, with id 0; the ITEM entry is N + 1
