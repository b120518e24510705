"""The certificate as numbers, text, figures, a page and JSON, and what it rests on."""
