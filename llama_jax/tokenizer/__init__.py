"""Text to token ids and back: SentencePiece, tiktoken and tokenizer.json behind one interface."""

from llama_jax.tokenizer.chat import DialogError
from llama_jax.tokenizer.files import load
from llama_jax.tokenizer.interface import StreamDecoder, Tokenizer, TokenizerError
from llama_jax.tokenizer.sentencepiece import SentencePiece

__all__ = ["DialogError", "SentencePiece", "StreamDecoder", "Tokenizer", "TokenizerError", "load"]
