"""The captioning model: a fixed encoder and a trainable decoder (paper section 5.2).

    frames of segments ──> encoder.py ──> vectors ──> decoder.py ──> log-probabilities of each next word
                                                  └─> beam_search.py ──> captions

B videos, K segments, R frames of each that are read, D a vector's length, T words, V words in the vocabulary.
"""

import torch
from torch import Tensor, nn

from grurcn.models.decoder import Decoder, DecoderConfig


class Captioner(nn.Module):
    """Encoder and decoder. Training may pass vectors that the encoder has computed before."""

    def __init__(self, encoder: nn.Module, vector_size: int, config: DecoderConfig, num_words: int):
        """encoder: frames of segments (B, K, R, H * 3 // 2, W) -> vectors (B, K, vector_size), as encoder.py's."""
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(config, vector_size, num_words)
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(vector_size))
        self.register_buffer("scale", torch.ones(vector_size))

    def forward(self, seen: Tensor, segments: Tensor, words: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """seen: as for `vectors`; segments (B, K) bool; words (B, T) int64, the captions; draw (B,) int64, each pair's random
        bits for dropout -> log-probabilities (B, T, V) of each word, attention (B, T, K)."""
        return self.decoder(self.vectors(seen), segments, words, draw)

    def standardise(self, vectors: Tensor) -> None:
        """Sets mean and scale so that each number of these vectors (N, D) has mean 0 and standard deviation 1.

        Joined encoders then have the same weight, whatever the size of their numbers. Of constant numbers only the mean is
        subtracted.
        """
        deviation = vectors.std(dim=0, correction=0)
        self.mean.copy_(vectors.mean(dim=0))
        self.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation, 1.0))

    def vectors(self, seen: Tensor) -> Tensor:
        """Frames (B, K, R, H * 3 // 2, W) uint8, or the encoder's vectors of them (B, K, D)
        -> the decoder's input (B, K, D) float32."""
        vectors = self.encoder(seen) if seen.dtype == torch.uint8 else seen
        return (vectors - self.mean) * self.scale
