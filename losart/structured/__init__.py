"""Grammars that answers follow: JSON schemas, regular expressions and Lark grammars, by llguidance."""
