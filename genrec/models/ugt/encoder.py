"""The encoder: group norm → ReLU-aggregated attention → group norm → feed-forward, causal over the event tokens."""

from __future__ import annotations

from torch import Tensor, nn

from genrec.interfaces import TokenType
from genrec.models.ugt.batch import PaddedTokens, TokenBatch
from genrec.models.ugt.config import UGTConfig
from genrec.models.ugt.layers import Dropout, FeedForward, GroupLayerNorm, ReluAttention, module_list, run_layer


class EncoderLayer(nn.Module):
    """Two sublayers, each normalised before it and added to the residual stream by the norm after it."""

    def __init__(self, config: UGTConfig) -> None:
        super().__init__()
        self.attention_norm = GroupLayerNorm(config.d_model, len(TokenType))
        self.attention = ReluAttention(config.d_model, config.heads, config.rel_bias_size)
        self.ffn_norm = GroupLayerNorm(config.d_model, len(TokenType))
        self.ffn = FeedForward(config.d_model, config.d_ffn, config.dropout)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, update: Tensor, residual: Tensor | None, tokens: TokenBatch | PaddedTokens
    ) -> tuple[Tensor, Tensor]:
        """update (…, D), not yet added to residual (…, D) or None → the same pair one layer on."""
        hidden, residual = self.attention_norm(update, tokens.type_ids, residual)
        update = self.dropout(self.attention.history(hidden, tokens))
        hidden, residual = self.ffn_norm(update, tokens.type_ids, residual)
        return self.dropout(self.ffn(hidden)), residual


class Encoder(nn.Module):
    """Embedded tokens → states, packed (T, D) or padded (B, S, D); a state has seen its own past and nothing else."""

    def __init__(self, config: UGTConfig) -> None:
        super().__init__()
        self.layers = module_list(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = GroupLayerNorm(config.d_model, len(TokenType))
        self.recompute = False  # trade activations for time, see run_layer

    def forward(self, x: Tensor, tokens: TokenBatch | PaddedTokens) -> Tensor:
        """x (…, D), the embedded tokens → (…, D), normalised."""
        update, residual = x, None
        for layer in self.layers:
            update, residual = run_layer(layer, self.recompute, update, residual, tokens)
        return self.norm(update, tokens.type_ids, residual)[0]
