"""Reads a tokenizer, whichever of the three kinds its file is, and shows it."""

import re
from pathlib import Path

from llama_jax.config import TokenizerInspectConfig
from llama_jax.tokenizer import tokenizer_json
from llama_jax.tokenizer.huggingface import HuggingFace
from llama_jax.tokenizer.interface import Tokenizer, TokenizerError
from llama_jax.tokenizer.sentencepiece import SentencePiece
from llama_jax.tokenizer.tiktoken import Tiktoken

# In a folder that holds both, the first is the original; the other was made from it.
NAMES = (Tokenizer.file_name, tokenizer_json.NAME)
MAX_FILE_BYTES = 32 * 2**20  # the largest of LLaMA's is below 18 MB


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, or in `tokenizer.model` or `tokenizer.json` of a folder.

    The content decides its kind. Raises TokenizerError when there is none, or it is damaged, or
    cannot write every byte; ConfigError where its library is not installed.
    """
    file = Path(path)
    if file.is_dir():
        found = [file / name for name in NAMES if (file / name).exists()]
        if not found:
            raise TokenizerError(f"{path}: this folder holds no {' or '.join(NAMES)}")
        file = found[0]
    try:
        with file.open("rb") as opened:
            model = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read ({error.strerror})") from error
    if len(model) > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{file}: larger than {MAX_FILE_BYTES:,} bytes, too large for a tokenizer"
        )
    return _kind(model, str(file))(model, str(file))


def _kind(model: bytes, path: str) -> type[SentencePiece | Tiktoken | HuggingFace]:
    if model.startswith(b"\xef\xbb\xbf"):
        raise TokenizerError(
            f"{path}: begins with a byte order mark, so an editor has saved it as text; use the "
            "original file"
        )
    if b"\noid sha256:" in model[:200]:
        raise TokenizerError(f"{path}: a pointer of Git LFS, not the file; run `git lfs pull`")
    if re.match(rb'\{|\s+\{\s*"', model):
        return HuggingFace
    if re.match(rb"[A-Za-z0-9+/]+=* \d", model):
        return Tiktoken
    return SentencePiece


def inspect_tokenizer(config: TokenizerInspectConfig) -> int:
    """Prints what a tokenizer holds and how it cuts a text; returns the exit code."""
    tokenizer = load(config.path)
    ids = tokenizer.encode(config.text)
    size = len(config.text.encode())
    print(f"file         {tokenizer.path} ({type(tokenizer).__name__})")
    print(f"fingerprint  {tokenizer.fingerprint}")
    print(
        f"pieces       {tokenizer.vocab_size:,} (bos {tokenizer.bos_id}, eos {tokenizer.eos_ids})"
    )
    if not tokenizer.lossless:
        print(
            "caution      it rewrites text before it cuts it, so decoding may differ from the text"
        )
    print(f"text         {config.text!r}")
    print(f"ids          {' '.join(map(str, ids))}")
    print(f"spellings    {' '.join(repr(tokenizer.spelling(i))[1:] for i in ids)}")
    print(f"rate         {len(ids)} tokens, {size / max(len(ids), 1):.2f} bytes each")
    print(f"round trip   {'equal' if tokenizer.decode(ids) == config.text else 'DIFFERENT'}")
    return 0
