"""Texts for `train_tiny_moe.py`: two domains, split by document, as token arrays.

- Code: the sources of the standard library of the running Python (PSF licence), without its tests and tables.
- Prose: the six finished novels of Jane Austen (public domain), from the Debian package r-cran-janeaustenr (MIT):

      apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
      python examples/tiny_moe_corpus.py --austen austen --out data

No document is in both splits: "Persuasion" and every tenth source file, by the hash of its name, are held out.
"""

import argparse
import hashlib
import json
import re
import struct
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
END = "<|endoftext|>"
HELD_OUT_NOVEL = "PERSUASION"
# Tables, tests, and copies of other files.
NOT_PROSE = re.compile(r"(^|/)(test|tests|idle_test|site-packages|encodings|pydoc_data|__pycache__|config-[^/]*)/")


def code_documents() -> dict[str, str]:
    """The standard library's sources by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not NOT_PROSE.search(str(path.relative_to(root))))
    texts = {str(path.relative_to(root)): path.read_text("utf-8", errors="ignore") for path in files}
    return {name: text for name, text in texts.items() if len(text) > 500}


def prose_documents(folder: Path) -> dict[str, str]:
    """The novels by title, from the package's R database: zlib blocks of serialised lines."""
    (path,) = folder.rglob("janeaustenr/data/Rdata.rdb")
    rest, novels = path.read_bytes(), {}
    while rest:
        # Four bytes of size, a zlib stream, and the next block.
        stream = zlib.decompressobj()
        lines = _strings(stream.decompress(rest[4:]))
        rest = stream.unused_data
        novels[lines[0].upper()] = "\n".join(lines)
    return novels


def _strings(data: bytes) -> list[str]:
    """The CHARSXP records of R's XDR serialisation, in order: flags with type 9, length, bytes."""
    start, found = data.index(b"\x00\x00\x00\x10") + 8, []  # behind STRSXP and its length
    while start + 8 <= len(data) and data[start + 3] == 9:
        (length,) = struct.unpack(">i", data[start + 4 : start + 8])
        length = max(length, 0)
        found.append(data[start + 8 : start + 8 + length].decode("utf-8"))
        start += 8 + length
    return found


def is_held_out(name: str) -> bool:
    """Decided from the name alone, so that no run can move a document across."""
    return name == HELD_OUT_NOVEL or int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All documents in one row, each behind an end-of-text token."""
    end = tokenizer.eos_token_id
    rows = tokenizer(texts)["input_ids"]
    return np.concatenate([np.array([end, *row], dtype=np.uint16) for row in rows])


def main() -> None:
    """Write tokenizer, token arrays, held-out texts and a list of the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--austen", type=Path, required=True, help="where the Debian package was unpacked")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    domains = {"code": code_documents(), "prose": prose_documents(arguments.austen)}
    splits = {
        (domain, split): {n: t for n, t in texts.items() if is_held_out(n) == (split == "held_out")}
        for domain, texts in domains.items()
        for split in ("train", "held_out")
    }
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([t for (_, split), ts in splits.items() if split == "train" for t in ts.values()])
    tokenizer.save_pretrained(out / "tokenizer")
    listing = {}
    for (domain, split), texts in splits.items():
        tokens = encode(tokenizer, list(texts.values()))
        size = sum(len(text.encode()) for text in texts.values())
        np.save(out / f"{split}_{domain}.npy", tokens)
        if split == "held_out":
            (out / f"{split}_{domain}.txt").write_text("".join(texts.values()), "utf-8")
        listing[f"{split}_{domain}"] = {"documents": len(texts), "bytes": size, "tokens": len(tokens)}
        print(f"{domain} {split}: {len(texts)} documents, {size / 1e6:.2f} MB, {len(tokens)} tokens")
    (out / "corpus.json").write_text(json.dumps(listing, indent=1))


if __name__ == "__main__":
    main()
