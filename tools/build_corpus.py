"""Build a plain-text corpus of technical documentation from permissively licensed Debian documentation packages.

Needs `apt-get`, `dpkg-deb` and lxml: `python tools/build_corpus.py --out corpus`.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import lzma
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lxml import html as lxml_html
from lxml.etree import ParserError

SEPARATOR = "\n\f\n"
HELDOUT_ONE_IN = 50
LONG_PAGE = 12_000
JOINED_LENGTH = 32_000
MAX_DOCUMENT = 400_000
SHORTEST_DOCUMENT = 400
REPEATED_BLOCK = 60


@dataclass(frozen=True)
class Package:
    name: str
    licence: str
    # Globs are matched against the path below usr/share/doc; `*` crosses folders.
    pages: tuple[str, ...] = ("*.html",)
    skip: tuple[str, ...] = ()
    cap_mb: float = 8.0


OPENSTACK_SKIP = ("*/api/*", "*/_modules/*")

# No GPL, LGPL, GFDL or share-alike source: the licence named is that of the pages taken.
PACKAGES = (
    Package("apache2-doc", "Apache-2.0", ("*/manual/en/*.html", "*/manual/en/*.html.en", "*/manual/*.html.en")),
    Package("cinder-doc", "Apache-2.0", skip=OPENSTACK_SKIP),
    Package("clang-14-doc", "Apache-2.0 WITH LLVM-exception"),
    Package("cmake-doc", "BSD-3-Clause"),
    Package("cython-doc", "Apache-2.0"),
    Package("dpdk-doc", "BSD-3-Clause", ("*/guides/*.html",)),
    Package("erlang-doc", "Apache-2.0", skip=("*/wx-*", "*/edoc-*", "*/syntax_tools-*"), cap_mb=12),
    Package("ghc-doc", "BSD-3-Clause", ("*/users_guide/*.html", "*/libraries/*.html"), ("*/src/*", "*/ghc-9*"), 12),
    Package("glance-doc", "Apache-2.0", skip=OPENSTACK_SKIP),
    Package("groovy-doc", "Apache-2.0", ("*/groovy/gapi/groovy/*.html",), cap_mb=4),
    Package("heat-doc", "Apache-2.0", skip=OPENSTACK_SKIP),
    Package("ironic-doc", "Apache-2.0", skip=OPENSTACK_SKIP),
    Package("keystone-doc", "Apache-2.0", skip=OPENSTACK_SKIP),
    Package("libboost1.74-doc", "BSL-1.0", cap_mb=12),
    Package("llvm-15-doc", "Apache-2.0 WITH LLVM-exception", cap_mb=10),
    Package("mypy-doc", "MIT"),
    Package("neutron-doc", "Apache-2.0", skip=OPENSTACK_SKIP),
    Package("nim-doc", "MIT"),
    Package("nodejs-doc", "MIT"),
    Package("nova-doc", "Apache-2.0", skip=OPENSTACK_SKIP),
    Package("numba-doc", "BSD-2-Clause"),
    Package("openvswitch-doc", "Apache-2.0"),
    Package("postgresql-doc-15", "PostgreSQL", cap_mb=16),
    Package("python-aiohttp-doc", "Apache-2.0"),
    Package("python-astropy-doc", "BSD-3-Clause", cap_mb=12),
    Package("python-cryptography-doc", "Apache-2.0 OR BSD-3-Clause"),
    Package("python-dask-doc", "BSD-3-Clause"),
    Package("python-distributed-doc", "BSD-3-Clause"),
    Package("python-django-doc", "BSD-3-Clause", cap_mb=12),
    Package("python-djangorestframework-doc", "BSD-2-Clause"),
    Package("python-flask-doc", "BSD-3-Clause"),
    Package("python-gevent-doc", "MIT"),
    Package("python-h5py-doc", "BSD-3-Clause"),
    Package("python-ipython-doc", "BSD-3-Clause"),
    Package("python-jinja2-doc", "BSD-3-Clause"),
    Package("python-pandas-doc", "BSD-3-Clause", cap_mb=12),
    Package("python-pytest-doc", "MIT"),
    Package("python-requests-doc", "Apache-2.0"),
    Package("python-scipy-doc", "BSD-3-Clause", cap_mb=12),
    Package("python-scrapy-doc", "BSD-3-Clause"),
    Package("python-skimage-doc", "BSD-3-Clause"),
    Package("python-sklearn-doc", "BSD-3-Clause", cap_mb=12),
    Package("python-sqlalchemy-doc", "MIT", cap_mb=12),
    Package("python-statsmodels-doc", "BSD-3-Clause", skip=("*/datasets/*",), cap_mb=12),
    Package("python-sympy-doc", "BSD-3-Clause", cap_mb=12),
    Package("python-tornado-doc", "Apache-2.0"),
    Package("python-werkzeug-doc", "BSD-3-Clause"),
    Package("python-xarray-doc", "Apache-2.0"),
    Package("python3.11-doc", "PSF-2.0", cap_mb=20),
    Package(
        "rust-doc",
        "MIT OR Apache-2.0",
        skip=(
            "*/src/*",
            "*/core/*",
            "*/alloc/*",
            "*/rustdoc/*",
            "*/rustc/*",
            "*/implementors/*",
            "*/library-features/*",
        ),
        cap_mb=20,
    ),
    Package("sphinx-doc", "BSD-2-Clause"),
    Package("sqlite3-doc", "public domain"),
    Package("swift-doc", "Apache-2.0", skip=OPENSTACK_SKIP),
    Package("twisted-doc", "MIT"),
    Package("varnish-doc", "BSD-2-Clause"),
)

# The demo fine-tunes on one part of these packages and evaluates on another: the base model must have seen neither.
DEMO_PACKAGES = ("sqlite3-doc", "nim-doc")
DEMO_DOCUMENTS = (
    ("train", "sqlite3-doc", "sqlite3/fts3.html"),
    ("train", "sqlite3-doc", "sqlite3/vtab.html"),
    ("train", "sqlite3-doc", "sqlite3/fileformat2.html"),
    ("train", "nim-doc", "nim/html/tut1.html"),
    ("train", "nim-doc", "nim/html/destructors.html"),
    ("heldout", "sqlite3-doc", "sqlite3/fts5.html"),
    ("heldout", "sqlite3-doc", "sqlite3/howtocorrupt.html"),
    ("heldout", "sqlite3-doc", "sqlite3/optoverview.html"),
    ("heldout", "sqlite3-doc", "sqlite3/json1.html"),
    ("heldout", "nim-doc", "nim/html/tut2.html"),
)

INDEX_PAGE = re.compile(
    r"(^|/)(genindex.*|general-index.*|search|py-modindex|http-routingtable|bookindex|print|toc|theindex|all|index-all"
    r"|overview-tree|package-tree|modindex|doc-index.*|sitemap|.*crossref|keyword_index|allclasses.*|objects)\.html"
)
DROPPED_TAGS = frozenset(
    [
        "script",
        "style",
        "nav",
        "footer",
        "head",
        "button",
        "form",
        "select",
        "input",
        "svg",
        "math",
        "img",
        "iframe",
        "noscript",
        "aside",
        "template",
        "textarea",
    ]
)
DROPPED_CLASSES = frozenset(
    [
        "sphinxsidebar",
        "related",
        "navheader",
        "navfooter",
        "headerlink",
        "toctree-wrapper",
        "toc",
        "contents",
        "sidebar",
        "linenos",
        "nav-wrapper",
        "menu",
        "nosearch",
        "bd-sidebar",
        "prev-next-area",
        "prev-next-bottom",
        "breadcrumb",
        "breadcrumbs",
        "wy-nav-side",
        "wy-breadcrumbs",
        "rst-footer-buttons",
        "footer",
        "header-container",
        "topbar",
        "left-buttons",
        "right-buttons",
        "menu-bar",
        "sub-container",
        "permalink",
        "docs-sidebar",
        "docs-sidebar-toc",
        "docs-sidebar-section",
        "viewcode-link",
        "viewcode-back",
        "anchor",
        "anchorjs-link",
        "srclink",
        "docs-actions",
        "quickview",
        "langSelect",
        "flagref",
        "mark",
        "apidocs",
        "spirit-nav",
        "copybtn",
        "mobile-topbar",
        "toggle-hidden",
        "tocwrapper",
        "localtoc",
        "docs-title",
        "fancy_toc",
        "link",
        "sphx-glr-download",
        "bottomlang",
        "toplang",
        "up",
        "out-of-band",
        "since-bar",
        "prompt_toggle",
    ]
)
DROPPED_IDS = frozenset(
    [
        "sidebar",
        "menu-bar",
        "toc",
        "tocRoot",
        "global-links",
        "gtoc",
        "sphinxsidebar",
        "quickview",
        "searchInputDiv",
        "synopsis-toc",
        "table-of-contents",
        "page-header",
        "preamble",
        "path",
        "footer",
        "package-header",
        "module-header",
        "toggle",
        "column2",
        "docs-navbar-container",
        "leftcol",
    ]
)
BLOCK_TAGS = frozenset(
    [
        "address",
        "article",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figure",
        "figcaption",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tbody",
        "td",
        "th",
        "thead",
        "tr",
        "ul",
    ]
)
CONTENT_ROOTS = (
    "//div[@itemprop='articleBody']",
    "//div[@role='main']",
    "//main",
    "//div[@class='body']",
    "//div[@id='apicontent']",
    "//div[@id='content']",
    "//article",
    "//body",
)


class BlockWriter:
    """Collects a page as blocks of text: one per paragraph, list item, table row, heading or code block."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self._inline: list[str] = []
        self._prefix = ""

    def flush(self) -> None:
        text = " ".join("".join(self._inline).split())
        self._inline.clear()
        if text:
            self.blocks.append(self._prefix + text)
            self._prefix = ""

    def element(self, node: lxml_html.HtmlElement) -> None:
        tag = node.tag
        if not isinstance(tag, str) or tag in DROPPED_TAGS or node.get("id") in DROPPED_IDS:
            return
        if not DROPPED_CLASSES.isdisjoint((node.get("class") or "").split()):
            return
        if tag == "pre":
            self.flush()
            for line_numbers in node.find_class("linenos"):
                line_numbers.drop_tree()
            code = node.text_content().strip("\n").rstrip()
            if code:
                self.blocks.append("\n".join(line.rstrip() for line in code.expandtabs(4).splitlines()))
            return
        if tag == "tr":
            self.flush()
            cells = [" ".join(cell.text_content().split()) for cell in node if cell.tag in ("td", "th")]
            # A row that holds code or a long cell is layout, not data.
            if node.find(".//pre") is None and node.find(".//p/..//p") is None and sum(map(len, cells)) < 400:
                if any(cells):
                    self.blocks.append(" | ".join(cells))
                return
        if tag == "br":
            self.flush()
            return
        if "classifier" in (node.get("class") or "").split():
            # Sphinx leaves the colon between a parameter and its type to the style sheet.
            self._inline.append(" : ")
        block = tag in BLOCK_TAGS
        if block:
            self.flush()
        if tag == "li":
            self._prefix = "- "
        elif len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self._prefix = "#" * int(tag[1]) + " "
        if node.text:
            self._inline.append(node.text)
        for child in node:
            self.element(child)
            if child.tail:
                self._inline.append(child.tail)
        if block:
            self.flush()
            self._prefix = ""


def page_blocks(path: Path) -> list[str]:
    """The text blocks of one HTML page, navigation dropped."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    # lxml refuses a str that declares its own encoding.
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    try:
        tree = lxml_html.document_fromstring(text)
    except ParserError:
        return []
    for query in CONTENT_ROOTS:
        roots = tree.xpath(query)
        if roots:
            break
    else:
        # A frame set holds no text.
        return []
    writer = BlockWriter()
    writer.element(roots[0])
    writer.flush()
    blocks = [block.replace("\f", " ").replace("¶", "") for block in writer.blocks]
    title = " ".join(" ".join(tree.xpath("//title/text()")).split())
    if title and blocks and not blocks[0].startswith("# "):
        blocks.insert(0, "# " + title)
    return blocks


def is_boilerplate(block: str, pages_with: int, pages: int) -> bool:
    """Whether a short block that many pages share is navigation; one-word labels and headings are kept."""
    return pages >= 10 and pages_with > 0.4 * pages and len(block) >= 12 and not block.startswith("#")


def join_blocks(blocks: list[str]) -> str:
    """Blocks as text: list items and table rows stay on neighbouring lines, all else is parted by an empty line."""
    parts: list[str] = []
    for i, block in enumerate(blocks):
        if i:
            before = blocks[i - 1]
            tight = (block.startswith("- ") and before.startswith("- ")) or (" | " in block and " | " in before)
            parts.append("\n" if tight else "\n\n")
        parts.append(block)
    return "".join(parts)


def fetch_package(name: str, work: Path) -> tuple[Path, str]:
    """Downloads and unpacks a Debian package; returns its root folder and its version."""
    archives = work / "debs"
    archives.mkdir(parents=True, exist_ok=True)
    if not list(archives.glob(f"{name}_*.deb")):
        subprocess.run(["apt-get", "download", "-q", name], cwd=archives, check=True, stdout=subprocess.DEVNULL)
    archive = sorted(archives.glob(f"{name}_*.deb"))[-1]
    root = work / "root" / name
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    version = subprocess.run(["dpkg-deb", "-f", str(archive), "Version"], check=True, capture_output=True, text=True)
    return root / "usr/share/doc", version.stdout.strip()


def natural_key(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def package_pages(package: Package, root: Path) -> list[str]:
    """The pages of a package, folder by folder, as paths below its documentation folder."""
    found = []
    for path in root.rglob("*.html*"):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() or not path.is_file() or INDEX_PAGE.search(name):
            continue
        full = "/" + name
        if not any(fnmatch.fnmatch(full, glob) for glob in package.pages):
            continue
        if any(fnmatch.fnmatch(full, glob) for glob in package.skip):
            continue
        found.append(name)
    # A folder's index introduces it, so it comes first.
    found.sort(
        key=lambda name: (natural_key(str(Path(name).parent)), "index" not in Path(name).stem, natural_key(name))
    )
    return found


def package_documents(package: Package, root: Path, seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """Yields (path of the first page, text); short neighbours are joined, blocks seen before are dropped."""
    group: list[str] = []
    group_name = ""
    group_size = 0
    pages = {name: page_blocks(root / name) for name in package_pages(package, root)}
    page_counts = Counter(block for blocks in pages.values() for block in set(blocks) if len(block) < REPEATED_BLOCK)
    for name, page in pages.items():
        blocks = []
        for block in page:
            if is_boilerplate(block, page_counts[block], len(pages)):
                continue
            if "/_modules/" in name and block.startswith("#"):
                # The licence header of a source file is the same everywhere.
                block = re.sub(r"\A(#.*\n|\n)+", "", block)
            if len(block) >= REPEATED_BLOCK:
                digest = hashlib.blake2b(block.encode(), digest_size=8).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            blocks.append(block)
        text = join_blocks(blocks)
        if len(text) < 200:
            continue
        alone = len(text) >= LONG_PAGE
        other_folder = group and Path(group_name).parent != Path(name).parent
        if group and (alone or (other_folder and group_size >= LONG_PAGE) or group_size >= JOINED_LENGTH):
            yield group_name, "\n\n".join(group)
            group, group_size = [], 0
        if alone:
            yield name, text[:MAX_DOCUMENT]
            continue
        if not group:
            group_name = name
        group.append(text)
        group_size += len(text)
    if group:
        yield group_name, "\n\n".join(group)


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def write_demo_documents(out: Path, work: Path) -> None:
    """Writes the demo's documents and LICENSES.md, which names the source and the notice of each."""
    out.mkdir(parents=True, exist_ok=True)
    packages = {package.name: package for package in PACKAGES}
    rows, notices = [], {}
    for split, name, page in DEMO_DOCUMENTS:
        root, version = fetch_package(name, work)
        source = name.removesuffix("-doc").removesuffix("3")
        file_name = f"{split}_{source}_{Path(page).stem}.txt"
        text = join_blocks(page_blocks(root / page)) + "\n"
        (out / file_name).write_text(text, encoding="utf-8")
        rows.append(f"| {file_name} | {name} | {version} | {packages[name].licence} | {page} |")
        stanzas = (root / name / "copyright").read_text(encoding="utf-8").split("\n\n")
        short = re.search(r"^License: *(\S+)", next(s for s in stanzas if s.startswith("Files: *\n")), re.M).group(1)
        kept = [s for s in stanzas if s.startswith("Files: *\n") or s.startswith(f"License: {short}\n")]
        notices[name] = "\n\n".join(dict.fromkeys(kept))
    lines = [
        "# Sources and licences of these documents",
        "",
        "Plain text made from the HTML pages of Debian documentation packages; navigation dropped, words unchanged.",
        "",
        "| file | package | version | licence | page |",
        "|---|---|---|---|---|",
        *rows,
    ]
    for name, notice in notices.items():
        lines += ["", f"## {name}", "", "```", notice.strip(), "```"]
    (out / "LICENSES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "corpus-packages", help="where packages are unpacked"
    )
    parser.add_argument("--max-mb", type=float, default=200.0, help="most clean text in total; every cap shrinks alike")
    parser.add_argument("--packages", help="only these, by name; commas")
    parser.add_argument("--shortest", type=int, default=SHORTEST_DOCUMENT, help="characters of a document, at least")
    parser.add_argument("--heldout-one-in", type=int, default=HELDOUT_ONE_IN, help="documents")
    parser.add_argument("--demo-documents", action="store_true", help="only write the demo's documents into OUT")
    args = parser.parse_args()
    if args.demo_documents:
        write_demo_documents(args.out, args.work)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    # lxml nests as deep as the page does.
    sys.setrecursionlimit(20_000)

    seen: set[bytes] = set()
    collected: dict[str, list[tuple[str, str]]] = {}
    sources = []
    names = [package.name for package in PACKAGES if package.name not in DEMO_PACKAGES]
    wanted = args.packages.split(",") if args.packages else names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--packages: {unknown[0]} is none of {', '.join(names)}")
    for package in PACKAGES:
        if package.name not in wanted:
            continue
        start = time.perf_counter()
        root, version = fetch_package(package.name, args.work)
        documents = [d for d in package_documents(package, root, seen) if len(d[1]) >= args.shortest]
        collected[package.name] = documents
        size = sum(len(text) for _, text in documents)
        sources.append({"package": package.name, "version": version, "licence": package.licence})
        seconds = time.perf_counter() - start
        print(f"{package.name:32s} {len(documents):5d} documents {size / 1e6:7.2f} MB {seconds:5.1f} s", flush=True)

    caps = {p.name: min(p.cap_mb * 1e6, sum(len(t) for _, t in collected.get(p.name, []))) for p in PACKAGES}
    shrink = min(1.0, args.max_mb * 1e6 / sum(caps.values()))
    train: list[str] = []
    heldout: list[str] = []
    for source in sources:
        budget = caps[source["package"]] * shrink
        # Which documents go when a package is over its cap must not depend on their order.
        ranked = sorted(collected[source["package"]], key=lambda d: stable_hash("cap:" + d[0]))
        kept = set()
        for name, text in ranked:
            if budget > 0:
                kept.add(name)
                budget -= len(text)
        counts = {"files": 0, "train_bytes": 0, "heldout_bytes": 0, "long_document_bytes": 0}
        for name, text in collected[source["package"]]:
            if name not in kept:
                continue
            size = len(text.encode())
            held = stable_hash(name) % args.heldout_one_in == 0
            (heldout if held else train).append(text)
            counts["files"] += 1
            counts["heldout_bytes" if held else "train_bytes"] += size
            counts["long_document_bytes"] += size if len(text) > 8_000 else 0
        source.update(counts)

    for name, documents in (("train", train), ("heldout", heldout)):
        data = SEPARATOR.join(documents).encode()
        packed = lzma.compress(data, preset=6)
        (args.out / f"{name}.txt.xz").write_bytes(packed)
        print(f"{name}: {len(documents)} documents, {len(data) / 1e6:.1f} MB, {len(packed) / 1e6:.1f} MB compressed")
    report = {"excluded_from_training": list(DEMO_PACKAGES), "packages": sources}
    (args.out / "SOURCES.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_demo_documents(args.out / "documents", args.work)


if __name__ == "__main__":
    main()
