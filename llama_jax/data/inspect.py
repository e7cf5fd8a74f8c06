"""`data inspect`: what a prepared corpus holds, and whether it is intact."""

from llama_jax import tokenizer
from llama_jax.config import DataInspectConfig
from llama_jax.data.shards import SPLITS, Stream, read_meta

_SHOWN_TOKENS = 64


def inspect_corpus(config: DataInspectConfig) -> int:
    """Prints counts and documents of a corpus; returns 0, or 1 where `verify` finds damage.

    Raises DataError for a folder that holds no finished corpus, or files of a wrong size.
    """
    meta = read_meta(config.path)
    print(f"corpus      {config.path}")
    print(f"tokenizer   {meta.tokenizer} ({meta.vocab_size:,} pieces)")
    print(
        f"records     {meta.records:,}: {meta.kept:,} kept, {sum(meta.dropped.values()):,} left out"
    )
    for reason, count in meta.dropped.items():
        print(f"            {count:,} {reason}")
    streams = {split: Stream(config.path, split) for split in SPLITS}
    for split, stream in streams.items():
        counts = f"{stream.documents:,} documents, {stream.tokens:,} tokens"
        print(f"{split:12}{counts}, {len(stream.parts)} shards")
    _show_documents(streams[config.split], config.documents)
    if not config.verify:
        return 0
    problems = [line for stream in streams.values() for line in stream.verify()]
    print("\n".join(problems) or "verified    every shard is as it was written")
    return 1 if problems else 0


def _show_documents(stream: Stream, count: int) -> None:
    """The beginning of `count` documents, at equal distances over the split."""
    text = tokenizer.load(stream.folder)
    count = min(count, stream.documents)
    for number in (stream.documents * i // count for i in range(count)):
        start, stop = stream.document(number)
        ids, _ = stream.read(start, min(stop, start + _SHOWN_TOKENS))
        print(f"\n{stream.split} document {number:,}, {stop - start:,} tokens:")
        print(text.decode(ids))
