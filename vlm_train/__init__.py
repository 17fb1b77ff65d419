"""vlm-train: a config says what is learned; the machine says only how fast."""

__version__ = "0.1.0"
