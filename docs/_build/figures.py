"""Figures of the pages, read from benchmarks/results and docs/gallery: none is typed.

`{{ name }}` in a page stands for `FIGURES[name]()`, a table or a number, as Markdown.
"""
import re

FIGURES = {}

def filled(text):
    return re.sub(r"\{\{ ([\w.]+) \}\}", lambda m: FIGURES[m[1]](), text)
