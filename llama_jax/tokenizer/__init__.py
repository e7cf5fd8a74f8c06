"""Text to token ids and back."""

from llama_jax.tokenizer.sentencepiece import StreamDecoder, Tokenizer, TokenizerError, load

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerError", "load"]
