"""Build the demo's corpus from packages: clean text -> split -> tokenizer -> token files.

    python bhlib/demo/corpus.py --work /tmp/demo-corpus --train .corpus

needs Debian's apt-get and dpkg (after `apt-get update`), pip, numpy, tokenizers and safetensors. It writes

- ``tokenizer.json``, ``tokenizer_config.json``, ``heldout.safetensors``, ``heldout.json`` beside this file,
- one ``<domain>.npy.xz`` of uint16 token ids per domain in the folder `--train` (not kept in the repository).

Documents (acts, chapters, countries, files) go as a whole to training or to a held-out split, before
the tokenizer is trained. Then every stretch of 50 tokens that a held-out document has too is cut out of the
training documents. In all token files a document ends with <|endoftext|>.

With the versions that heldout.json names (as a file of constraints for pip, PIP_CONSTRAINT=…) the tokenizer and the
held-out files come out the same to the byte, and the training files but for some hundred tokens that are cut.
"""

import argparse
import io
import json
import lzma
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sources import SOURCES, documents, fetch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
END = "<|endoftext|>"
VOCABULARY = 4096
HELD_OUT = {"test": 57_344, "validation": 24_576, "calibration": 24_576}  # tokens per domain
EXCERPT = 24_000  # characters: the longest stretch of one document that is held out, for variety
SHARED = 50  # tokens: as long a stretch must not occur both in held-out and in training documents


def split(docs: list[str], seed: int) -> dict[str, list[str]]:
    """Shuffle documents and deal them out: held-out splits until each has enough text, the rest to train."""
    random.Random(seed).shuffle(docs)
    parts = {}
    for name, tokens in HELD_OUT.items():
        parts[name], size = [], 0
        while size < 4.2 * tokens:  # more characters than needed: the exact cut is made in tokens
            parts[name].append(docs.pop()[:EXCERPT])
            size += len(parts[name][-1])
    return parts | {"train": docs}


def train_tokenizer(texts: dict[str, list[str]], characters: int = 6_000_000) -> Tokenizer:
    """Byte-level BPE of 4096 tokens on equally much training text of every domain; digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )

    def sample():
        for docs in texts.values():
            size = 0
            for text in docs:
                if size < characters:
                    yield text
                    size += len(text)

    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, docs: list[str]) -> list[np.ndarray]:
    """Token ids of each document, uint16, <|endoftext|> last."""
    end = tokenizer.token_to_id(END)
    batches = (tokenizer.encode_batch_fast(docs[i : i + 512]) for i in range(0, len(docs), 512))
    return [np.array([*encoding.ids, end], np.uint16) for batch in batches for encoding in batch]


def window_hashes(tokens: np.ndarray, width: int = SHARED) -> np.ndarray:
    """A 64-bit polynomial hash of every `width` consecutive tokens (same tokens, same hash), uint64 [n]."""
    if len(tokens) < width:
        return np.empty(0, np.uint64)
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    value = np.zeros(len(tokens) - width + 1, np.uint64)
    for i in range(width):
        value = value * np.uint64(0xBF58476D1CE4E5B9) + mixed[i : i + len(value)]  # modulo 2**64
    return value


def without_overlap(tokens: np.ndarray, held_out: np.ndarray, end: int) -> np.ndarray:
    """Training tokens less every stretch of 50 that `held_out` has too.

    A document goes on after a cut as a new one; pieces shorter than 50 tokens are cut as well. Repeated until
    nothing is shared, since a cut brings new neighbours together.
    """
    known = np.unique(window_hashes(held_out))
    while True:
        hashes = window_hashes(tokens)
        starts = np.flatnonzero(known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] == hashes)
        if not len(starts):
            return tokens
        shared = np.zeros(len(tokens), bool)
        for start in starts:
            shared[start : start + SHARED] = True
        borders = np.flatnonzero(np.diff(shared)) + 1
        pieces = []
        for piece, cut in zip(np.split(tokens, borders), np.split(shared, borders), strict=True):
            if not cut[0] and len(piece) >= SHARED:
                pieces += [piece] if piece[-1] == end else [piece, np.array([end], tokens.dtype)]
        tokens = np.concatenate(pieces)


def write_xz(path: Path, tokens: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    path.write_bytes(lzma.compress(buffer.getvalue(), preset=6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--train", type=Path, default=Path(".corpus"), help="folder for the training tokens")
    parser.add_argument("--seed", type=int, default=1995)
    args = parser.parse_args()
    args.train.mkdir(parents=True, exist_ok=True)

    texts = {
        domain: split(sorted({text for _, _, text in documents(domain, args.work)}), args.seed) for domain in SOURCES
    }
    tokenizer = train_tokenizer({domain: parts["train"] for domain, parts in texts.items()})
    tokenizer.save(str(HERE / "tokenizer.json"))
    (HERE / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END,
                "eos_token": END,
                "pad_token": END,
                "model_max_length": 1024,
                "clean_up_tokenization_spaces": False,
            },
            indent=2,
        )
        + "\n"
    )

    end, arrays, report = tokenizer.token_to_id(END), {}, {}
    for domain, parts in texts.items():
        splits = {}
        for name, length in HELD_OUT.items():
            tokens = np.concatenate(encode(tokenizer, parts[name]))[:length]
            tokens[-1] = end
            arrays[f"{name}/{domain}"] = tokens.astype(np.int16)
            text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
            splits[name] = {"tokens": length, "bytes": len(text.encode()), "documents": int((tokens == end).sum())}
        report[domain] = {
            "splits": splits,
            "sources": [
                {
                    "package": name,
                    "version": fetch(name, installer, args.work)[1],
                    "installer": installer,
                    "licence": licence,
                }
                for name, (installer, licence) in SOURCES[domain].items()
            ],
        }
    held_out = np.concatenate(list(arrays.values())).astype(np.uint16)
    for domain, parts in texts.items():
        everything = np.concatenate(encode(tokenizer, parts["train"]))
        tokens = without_overlap(everything, held_out, end)
        write_xz(args.train / f"{domain}.npy.xz", tokens)
        report[domain]["train"] = {
            "tokens": len(tokens),
            "documents": len(parts["train"]),
            "tokens_cut_for_overlap": len(everything) - len(tokens),
        }
        print(domain, report[domain]["train"], report[domain]["splits"]["test"], flush=True)
    save_file(arrays, HERE / "heldout.safetensors")
    (HERE / "heldout.json").write_text(
        json.dumps({"seed": args.seed, "end_token": end, "shared_tokens": SHARED, "domains": report}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
