"""The files of the official checkpoint that are not weights: its configs and its tokenizer (see NOTICE).

Data only; whoever makes a checkpoint in the official format, or needs the tokenizer without one, reads them.
"""

from pathlib import Path


def folder() -> Path:
    """The folder that holds config.json, generation_config.json, preprocessor_config.json and tokenizer.json.gz."""
    return Path(__file__).parent
