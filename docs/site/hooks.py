"""Hooks of MkDocs: files that a page links to become pages, and docstrings are shown as Hugging Face means them."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?:\.\./)+((?:src|examples|tests|benchmarks|model_cards)/[^)#]+\.(\w+))\)")
LANGUAGES = {"py": "python", "md": "markdown"}


def on_files(files: Files, config: Any) -> Files:
    for page in files.documentation_pages():
        for path, suffix in LINK.findall(page.content_string):
            if f"source/{path}.md" not in files.src_uris:
                code = (ROOT / path).read_text(encoding="utf-8")
                content = f"# {path}\n\n````{LANGUAGES.get(suffix, suffix)}\n{code}````\n"
                content = f"---\nsearch: {{exclude: true}}\n---\n{content}"
                files.append(File.generated(config, f"source/{path}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """A link to another page shows its title instead of the name of its file."""
    up = "../" * page.file.src_uri.count("/")
    markdown = LINK.sub(lambda link: f"]({up}source/{link[1]}.md)", markdown)
    return re.sub(r"\[(\w+\.md)\](?=\(\1[)#])", lambda link: f"[{_title(files, link[1])}]", markdown)


def on_page_content(html: str, page: Any, files: Files, **_: Any) -> str:
    """Cells hold `a|b` as GitHub shows it. In types "`int`, *optional*" is Markdown, and "[`sparsify_`]" a link.
    All names of api.md are."""
    html = re.sub(r"<td.*?</td>", lambda cell: cell[0].replace("\\|", "|"), html, flags=re.DOTALL)
    if page.file.src_uri.startswith("reference/"):
        documented = _documented(files)
        html = re.sub(r"<code>([^<]*`[^<]*)</code>", lambda code: _inline(code[1]), html)
        html = re.sub(r"\[<code>~?([\w.]+)</code>\]", lambda name: _reference(documented, name[1]), html)
    elif page.file.src_uri == "api.md":
        documented = _documented(files)
        html = re.sub(r"<code>(\w+)</code>", lambda name: _reference(documented, name[1]), html)
    return html


def _title(files: Files, path: str) -> str:
    file = files.get_file_from_path(path)
    return path if file is None else file.content_string.partition("\n")[0].removeprefix("# ")


def _inline(markdown: str) -> str:
    return re.sub(r"\*(\w+)\*", r"<em>\1</em>", re.sub("`([^`]*)`", r"<code>\1</code>", markdown))


def _documented(files: Files) -> dict[str, str]:
    """Names, and what the reference documents them as; of two the first."""
    pages = "".join(file.content_string for file in files.documentation_pages() if "reference/" in file.src_uri)
    found = re.findall(r"^::: (\S+\.(\w+))$", pages, re.MULTILINE)
    return {name: path for path, name in reversed(found)}


def _reference(documented: dict[str, str], path: str) -> str:
    name = path.rpartition(".")[2]
    code = f"<code>{name}</code>"
    return f'<autoref identifier="{documented[name]}">{code}</autoref>' if name in documented else code
