"""Texts for `train_fine_moe.py`: three domains from packages of Debian 12, split by document, as token arrays.

- books: Jane Austen's novels (r-cran-janeaustenr, public domain), An Anarchist FAQ
  (anarchism, GFDL or GPL), the Debian Administrator's Handbook (debian-handbook, CC BY-SA or GPL), the Collaborative
  International Dictionary of English (dict-gcide, GPL).
- documentation: of Linux (linux-source-6.1, GPL), Python (python3.11-doc, PSF), Perl (perl-doc, GPL or Artistic), git
  (git-doc, GPL), Linux's system calls and libraries (manpages, manpages-dev, free licences), Debian (debian-policy,
  debian-reference-en, developers-reference, debian-faq, GPL).
- sources: of Linux (linux-source-6.1, GPL), Rust's compiler (rust-src, MIT or Apache), Python's standard library (PSF).

The models of docs/quality.md were trained on all of it: 68.4 M tokens.

      apt-get download $PACKAGES; for f in *.deb; do dpkg-deb -x $f debian/${f%%_*}; done
      tar -C debian/linux-source-6.1 -xJf debian/linux-source-6.1/usr/src/linux-source-6.1.tar.xz
      python examples/fine_moe_corpus.py gather --debian debian --out texts     # documents as compressed JSON lines
      python examples/fine_moe_corpus.py encode --texts texts --out data        # tokenizer and token arrays

Every twelfth document, by the hash of its name, is held out.
"""

import argparse
import contextlib
import gzip
import hashlib
import html
import json
import lzma
import re
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END = "<|endoftext|>"
DOMAINS = ("books", "documentation", "sources")
CHUNK = 200_000  # characters of a document; longer ones are cut at a line
TOKENIZER_TEXT = 12_000_000  # characters that the tokenizer is trained on, in equal parts of the domains
# Domain, package, files, and the share of its documents that is taken.
SOURCES = (
    ("books", "anarchism", "**/*.html*", 1.0),
    ("books", "debian-handbook", "**/en-US/*.html", 1.0),
    ("books", "dict-gcide", "**/*.dict.dz", 1.0),
    ("documentation", "linux-source-6.1", "**/Documentation/**/*.rst", 1.0),
    ("documentation", "linux-source-6.1", "**/Documentation/**/*.txt", 1.0),
    ("documentation", "python3.11-doc", "**/_sources/**/*.txt", 1.0),
    ("documentation", "perl-doc", "**/*.pod", 1.0),
    ("documentation", "git-doc", "**/*.txt", 1.0),
    ("documentation", "manpages", "**/*.gz", 1.0),
    ("documentation", "manpages-dev", "**/*.gz", 1.0),
    ("documentation", "debian-policy", "**/policy.txt.gz", 1.0),
    ("documentation", "debian-reference-en", "**/*.en.txt.gz", 1.0),
    ("documentation", "developers-reference", "**/*.en.txt*", 1.0),
    ("documentation", "debian-faq", "**/*.en.txt*", 1.0),
    *(("sources", "linux-source-6.1", f"*/{part}/**/*.c", 0.7) for part in ("fs", "kernel", "lib", "mm", "net")),
    ("sources", "rust-src", "**/compiler/**/*.rs", 0.3),
)


def share(name: str) -> float:
    """A number in [0, 1) that a name alone decides."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8


def read(path: Path) -> str:
    """A text file, compressed or not; of HTML the text."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix in (".gz", ".dz") else raw).decode("utf-8", errors="ignore")
    if ".html" in path.name:
        text = re.sub(r"(?s)<(script|style|head).*?</\\1>", "", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\n{3,}", "\n\n", text)


def documents(debian: Path) -> Iterator[tuple[str, str, str]]:
    """(domain, name, text) of all documents, in a fixed order."""
    yield from austen(debian / "r-cran-janeaustenr")
    for domain, package, pattern, taken in SOURCES:
        for path in sorted((debian / package).glob(pattern)):
            name = f"{package}/{path.relative_to(debian / package)}"
            if path.is_file() and not path.is_symlink() and share("taken " + name) < taken:
                yield from pieces(domain, name, read(path))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        name = str(path.relative_to(library))
        if not re.search(r"(^|/)(test|tests|idle_test|site-packages|encodings|pydoc_data|config-[^/]*)/", name):
            yield from pieces("sources", f"python/{name}", read(path))


def austen(folder: Path) -> Iterator[tuple[str, str, str]]:
    """The novels, by the reader of the smaller models' corpus."""
    from tiny_moe_corpus import prose_documents

    for title, text in prose_documents(folder).items():
        yield from pieces("books", title, text)


def pieces(domain: str, name: str, text: str) -> Iterator[tuple[str, str, str]]:
    """A document, long ones in parts of whole lines; what is too short to predict is left out."""
    start = 0
    while len(text) - start > 500:
        end = len(text) if len(text) - start <= CHUNK else text.rfind("\n", start, start + CHUNK) + 1
        end = end if end > start else min(len(text), start + CHUNK)
        yield domain, f"{name}#{start}", text[start:end]
        start = end


def gather(debian: Path, out: Path, shards: int) -> None:
    """Write `texts-N.jsonl.xz`: of each document its domain, name and text. A document is in one shard."""
    out.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    sizes = dict.fromkeys(DOMAINS, 0)
    with contextlib.ExitStack() as stack:
        paths = [out / f"texts-{n}.jsonl.xz" for n in range(shards)]
        files = [stack.enter_context(lzma.open(path, "wt", encoding="utf-8")) for path in paths]
        for domain, name, text in documents(debian):
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            sizes[domain] += len(text)
            files[int(share("shard " + name) * shards)].write(json.dumps([domain, name, text]) + "\n")
    print({domain: f"{size / 1e6:.1f} M characters" for domain, size in sizes.items()})


def load(path: Path) -> list[tuple[str, str, str]]:
    """The documents of one shard."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [tuple(json.loads(line)) for line in file]


def train_tokenizer(texts: dict[str, list[str]]) -> Tokenizer:
    """A byte-level BPE: every text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = []
    for domain in sorted(texts):
        left = TOKENIZER_TEXT // len(texts)
        for text in texts[domain]:
            if left <= 0:
                break
            sample.append(text[:left])
            left -= len(text)
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(texts: Path, out: Path) -> None:
    """Write the tokenizer, `{split}_{domain}.npy` (uint16, an end-of-text token ahead of each document) and sizes."""
    out.mkdir(parents=True, exist_ok=True)
    shards = sorted(texts.glob("texts-*.jsonl.xz"))
    with ProcessPoolExecutor() as pool:
        found = [document for shard in pool.map(load, shards) for document in shard]
    # In an order that does not tell where a document comes from.
    found.sort(key=lambda document: share("order " + document[1]))
    split: dict[str, dict[str, list[str]]] = {"train": {d: [] for d in DOMAINS}, "held_out": {d: [] for d in DOMAINS}}
    for domain, name, text in found:
        split["held_out" if share(name) < 1 / 12 else "train"][domain].append(text)
    tokenizer = train_tokenizer(split["train"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
    wrapped.save_pretrained(out / "tokenizer")
    listing = {}
    for part, domains in split.items():
        for domain, documents_ in domains.items():
            rows = tokenizer.encode_batch_fast(documents_)
            tokens = np.concatenate([np.array([0, *row.ids], dtype=np.uint16) for row in rows])
            np.save(out / f"{part}_{domain}.npy", tokens)
            size = sum(len(text.encode()) for text in documents_)
            listing[f"{part}_{domain}"] = {"documents": len(rows), "bytes": size, "tokens": len(tokens)}
            print(part, domain, listing[f"{part}_{domain}"], flush=True)
    (out / "corpus.json").write_text(json.dumps(listing, indent=1) + "\n")


def main() -> None:
    """Gather documents, or encode them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["gather", "encode"])
    parser.add_argument("--debian", type=Path, help="where the packages were unpacked")
    parser.add_argument("--texts", type=Path, help="what `gather` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.step == "gather":
        gather(arguments.debian, arguments.out, arguments.shards)
    else:
        encode(arguments.texts, arguments.out)


if __name__ == "__main__":
    main()
