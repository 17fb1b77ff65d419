"""The *scenes* dataset: coloured shapes that we draw ourselves, so that everything about them is known."""

from vlm_train.data.scenes.make import make_scenes

__all__ = ["make_scenes"]
