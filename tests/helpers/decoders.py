"""Decoders with random weights."""

import torch

from grurcn.models.decoder import Decoder, DecoderConfig

WORDS, SIZE = 7, 3  # in the vocabulary; of a segment's vector

TINY = DecoderConfig(hidden=4, embedding=5, attention=6)


def random_decoder(seed=0, config=TINY, vector_size=SIZE, num_words=WORDS):
    """With weights large enough to bend every tanh and sigmoid, in float64."""
    decoder = Decoder(config, vector_size, num_words).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
    return decoder
