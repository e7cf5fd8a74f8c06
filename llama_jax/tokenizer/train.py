"""`tokenizer train`: learns a SentencePiece tokenizer with LLaMA's settings from text."""

import hashlib
import heapq
import io
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from llama_jax.config import TokenizerTrainConfig
from llama_jax.data import sources
from llama_jax.data.shards import write_atomic
from llama_jax.data.sources import MEBIBYTE, Dropped
from llama_jax.tokenizer import SentencePiece, TokenizerError

# SentencePiece leaves out a line above 4,192 bytes and aborts the process on a word above 65,535
# characters; 1,000 characters are at most 4,000 bytes.
_MAX_CHARACTERS = 1000


def train_tokenizer(config: TokenizerTrainConfig) -> int:
    """Learns a tokenizer from the files and writes it; returns the exit code.

    The same files give the same bytes. Raises ConfigError where there is nothing to read, and
    TokenizerError where the text does not suit vocab_size.
    """
    started = time.monotonic()
    files = sources.find(config.paths)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    ) as bar:
        texts, dropped = _sample(files, config, bar)
        size = sum(len(text) for text in texts)
        # The trainer says nothing until it is done: a bar without an end, and the time so far.
        bar.add_task(f"learning {config.vocab_size:,} pieces", total=None)
        lines = (line for text in texts for line in text.decode().split("\n"))
        model = train(lines, config.vocab_size, config.character_coverage)
    tokenizer = SentencePiece(model, str(out))
    write_atomic(out, model)
    tokens = sum(len(tokenizer.encode(text.decode())) for text in texts[:100])
    measured = sum(len(text) for text in texts[:100])
    print(f"learned from {len(texts):,} documents, {size / MEBIBYTE:,.1f} MiB of text")
    if dropped:
        print("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in sorted(dropped.items())))
    print(f"{tokenizer.vocab_size:,} pieces, {measured / max(tokens, 1):.2f} bytes per token")
    print(
        f"wrote {out} in {time.monotonic() - started:.0f} s (fingerprint {tokenizer.fingerprint})"
    )
    return 0


def train(lines: Iterable[str], vocab_size: int, character_coverage: float = 0.99995) -> bytes:
    """Learns a tokenizer from lines of text; returns the bytes of its file.

    The same lines give the same bytes. Raises TokenizerError when the text does not support
    `vocab_size` pieces, or needs more for its characters.
    """
    file = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_short(lines),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=16,  # written into the file, so it may not follow the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_explain(str(error), vocab_size)) from error
    return file.getvalue()


def _sample(
    files: list[Path], config: TokenizerTrainConfig, bar: Progress
) -> tuple[list[bytes], Counter[str]]:
    """Documents of at most sample_mb together, in order, and what could not be read, by reason.

    Of a larger corpus, those with the smallest hashes: a draw that depends on the documents alone
    and needs no second pass and no more memory than the sample.
    """
    limit = config.sample_mb * MEBIBYTE
    kept: list[tuple[int, int, bytes]] = []  # a heap: largest hash first, given negative
    dropped: Counter[str] = Counter()
    size = 0
    sizes = [file.stat().st_size for file in files]
    before = list(itertools.accumulate(sizes, initial=0))
    task = bar.add_task(f"reading {len(files):,} files", total=before[-1])
    for place, record in enumerate(sources.read(files, config)):
        if place % 256 == 0:
            bar.update(task, completed=before[record.file] + record.position)
        text = sources.document(record, config.text_field)
        if isinstance(text, Dropped):
            dropped[text.reason] += 1
            continue
        content = text.encode()
        rank = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        heapq.heappush(kept, (-rank, place, content))
        size += len(content)
        while size > limit and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2])
    bar.update(task, completed=before[-1])
    return [content for _, _, content in sorted(kept, key=lambda item: item[1])], dropped


def _short(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        for start in range(0, len(line), _MAX_CHARACTERS):
            yield line[start : start + _MAX_CHARACTERS]


def _explain(message: str, vocab_size: int) -> str:
    """SentencePiece's complaint in plain words."""
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"vocab_size {vocab_size} is more than this text yields: at most {found[1]}"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small for the characters of this text: at least "
            f"{found[1]}, or lower character_coverage"
        )
    if "sentences_.empty()" in message:
        return "there is no text to learn a tokenizer from"
    return f"SentencePiece cannot learn from this text: {message}"
